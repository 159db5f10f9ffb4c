"""In which columns a data set has what a kind of loss needs, and what to do where it has not."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from logratio.losses import LOSSES, Kind

from ..errors import RowError, UserError, shown
from .chat.conversations import is_written_out
from .lists import COMPLETIONS, REWARDS, taken_apart
from .report import Report
from .tokenization import is_conversation

# For each kind the sets of columns that will do, the preferred one first. ShareGPT's `conversations` is a whole
# conversation like `messages`, and what chosen and rejected answer where it stands beside them.
COLUMNS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    Kind.SEQUENCE: (("prompt", "completion"), ("messages",), ("conversations",), ("text",)),
    Kind.PAIRED: (("prompt", "chosen", "rejected"), ("conversations", "chosen", "rejected"), ("chosen", "rejected")),
    Kind.LABELED: (
        ("prompt", "completion", "label"),
        ("prompt", "chosen", "rejected"),
        ("conversations", "chosen", "rejected"),
        ("chosen", "rejected"),
    ),
    Kind.LISTED: (("prompt", COMPLETIONS, REWARDS), (COMPLETIONS, REWARDS)),
    Kind.GROUPED: (("prompt",),),
}
GOLD = "reference"  # the third, gold completion beside chosen and rejected (TPO)


@dataclass(frozen=True, slots=True)
class Layout:
    """In which columns and which format the rows are: those of the first row that can be used.

    prompt: None where there is no such column. completions: the others that hold text (of lists: the one that holds all
    of them). names: all of that row. margin: pairs have one.
    """

    kind: Kind
    prompt: str | None
    completions: tuple[str, ...]
    labeled: bool
    conversational: bool
    names: tuple[str, ...]
    margin: bool = False

    @property
    def texts(self) -> tuple[str, ...]:
        """All columns that hold text."""
        return self.completions if self.prompt is None else (self.prompt, *self.completions)


def find_layout(report: Report, kind: Kind, *, gold: bool = False, margin: bool = False) -> Layout:
    """Raises UserError where the first row has no set of columns that will do, naming those that it has.

    gold: pairs have a third completion. margin: they have a margin. Where bad rows are skipped, the first row that has
    the columns counts, and where none has them, the first one is named.
    """
    first: UserError | None = None
    for index, row in enumerate(report.rows):
        try:
            if isinstance(row, RowError):
                raise row
            return replace(_layout(row, report.rows.where(index), kind, gold), margin=margin)
        except UserError as error:
            if not report.skip:
                raise
            first = first or error
    assert first is not None
    raise first


def _layout(row: Mapping[str, Any], where: str, kind: Kind, gold: bool) -> Layout:
    columns = columns_of(row, kind)
    if columns is None:
        expected = ", or ".join(" and ".join(columns) for columns in COLUMNS[kind])
        remedy = remedy_of(row, kind)
        raise UserError(f"{where} has the columns {', '.join(row) or '(none)'}, expected {expected}{remedy}")
    if gold and row.get(GOLD) is None:
        raise UserError(
            f"{where} has no {GOLD!r}, the gold completion that this method learns from beside chosen and "
            "rejected: add the column, or use a method that needs pairs alone, as cpo"
        )
    prompt = columns[0] if columns[0] == "prompt" or len(columns) == 3 else None
    completions = tuple(c for c in columns if c not in (prompt, "label", REWARDS))
    value = row[columns[0]]
    if columns[0] == COMPLETIONS:
        value = taken_apart(row, where)[0][f"{COMPLETIONS}[0]"]
    if columns == ("text",) and is_written_out(value):
        raise UserError(
            f"{where}: 'text' is a list of messages written out: call the column 'messages', which goes through the "
            "chat template"
        )
    named = columns[0] in ("messages", "conversations")
    conversational = named or is_conversation(value) or isinstance(value, dict) or is_written_out(value)
    if not conversational and not isinstance(value, str):
        raise UserError(f"{where}: {columns[0]!r} must be text or a list of messages, got {shown(value)}")
    return Layout(
        kind,
        prompt,
        (*completions, GOLD) if gold else completions,
        labeled="label" in columns,
        conversational=conversational,
        names=tuple(row),
    )


def columns_of(row: Mapping[str, Any], kind: Kind) -> tuple[str, ...] | None:
    """The first set that the row has whole."""
    return next((columns for columns in COLUMNS[kind] if all(row.get(c) is not None for c in columns)), None)


def remedy_of(row: Mapping[str, Any], kind: Kind) -> str:
    """What to do about columns that will not do: a name that is near one that is missing, or the method that they are
    for; "" where neither is known."""
    found = {other: columns for other in COLUMNS if (columns := columns_of(row, other)) is not None}
    known = {column for other in (kind, *found) for columns in COLUMNS[other] for column in columns}
    missing = sorted({column for columns in COLUMNS[kind] for column in columns} - row.keys())
    for name in (column for column in row if column not in known):
        if near := difflib.get_close_matches(str(name), missing, n=1, cutoff=0.75):
            return f"; is {name!r} meant to be {near[0]!r}? then rename it"
    if not found:
        return ""
    best = max(found, key=lambda other: (len(found[other]), other is Kind.PAIRED))
    method = next(name for name, loss in LOSSES.items() if loss.kind is best)
    return f"; these are {method}'s columns: logratio train {method}"
