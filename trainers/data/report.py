"""What became of the rows: those that cannot be used, and the line that counts the rest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import RowError, UserError, counted
from .rows import Rows

SHOWN_REASONS = 3
COUNTS = ("examples", "truncated", "tokens_cut", "dropped", "identical", "moved", "weighted", "begun", "special")


def count_reasons(errors: list[RowError]) -> str:
    """How many rows are bad for which reason, whatever the value or the position; the rare reasons are only counted."""
    reasons = Counter(_kind(error.reason) for error in errors).most_common()
    shown = [f"{count} x {reason}" for reason, count in reasons[:SHOWN_REASONS]]
    rest = sum(count for _, count in reasons[SHOWN_REASONS:])
    return ", ".join(shown + ([f"{rest} for other reasons"] if rest else []))


def _kind(reason: str) -> str:
    """The reason without its remedy, the value that was met, and where in the row."""
    return re.sub(r"\b\d+\b", "N", reason.partition(", got ")[0].partition(": ")[0])


@dataclass
class Report:
    """What became of the rows; `str(report)` is one line.

    examples: that remain. truncated: completions cut at `max_length`, by `tokens_cut` tokens together. dropped:
    examples without a scored token within `max_length`. identical: pairs whose two completions are the same tokens,
    from which nothing can be learned. moved: examples whose prompt, tokenized alone, ends otherwise than with its
    completion behind it, so that the completion starts where the two part. weighted: examples with weights other
    than 1. begun: examples whose prompt ends with an assistant's turn. special: examples whose own text has special
    tokens, which are read as such. labels: (True, False) counts. found: the rows that cannot be used, by their index,
    each left out (skip); else the first ends the run.
    """

    rows: Rows = field(repr=False)
    skip: bool = False
    examples: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    dropped: int = 0
    identical: int = 0
    moved: int = 0
    weighted: int = 0
    begun: int = 0
    special: int = 0
    labels: tuple[int, int] | None = None
    found: dict[int, RowError] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.rows.name

    def take(self, error: UserError, row: int) -> None:
        """An error that came up at this row: raised where rows are not skipped, or it is not about the row."""
        own = RowError.of(error, self.rows.where(row), row)
        if own is None:
            raise error
        if not self.skip:
            raise own from None
        self.found.setdefault(row, own)

    def count(self, made: Sequence[Any]) -> None:
        """Examples, or prompts, that a row has become."""
        self.examples += len(made)
        labels = [label for one in made if (label := getattr(one, "label", None)) is not None]
        if labels:
            desirable, undesirable = self.labels or (0, 0)
            self.labels = (desirable + sum(labels), undesirable + len(labels) - sum(labels))

    def add(self, other: Report) -> None:
        """The counts and the skipped rows of a part of the same rows."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.labels:
            desirable, undesirable = self.labels or (0, 0)
            self.labels = (desirable + other.labels[0], undesirable + other.labels[1])
        self.found |= other.found

    @property
    def errors(self) -> list[RowError]:
        """Of the rows that were skipped, in their order."""
        return [self.found[row] for row in sorted(self.found)]

    def counts(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in COUNTS}, "labels": self.labels}

    def as_dict(self) -> dict[str, Any]:
        """The counts and the skipped rows, without the data set's name, as JSON has them; see `from_dict`."""
        return {**self.counts(), "skipped": [[error.row, str(error)[len(error.place) :]] for error in self.errors]}

    def card(self, rows: int | None) -> dict[str, Any]:
        """What data_card.json has of the data set. rows: how many it has, where one knows."""
        skipped = {"skipped": len(self.errors), "skipped_reasons": count_reasons(self.errors)}
        return {"name": self.name, "rows": rows, **self.counts(), **skipped}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], rows: Rows) -> Report:
        """What `as_dict` has said of these rows, perhaps under another name."""
        found = {row: RowError(rows.where(row), rest, row) for row, rest in stored["skipped"]}
        labels = stored["labels"] and (stored["labels"][0], stored["labels"][1])
        return cls(rows, labels=labels, found=found, **{name: stored[name] for name in COUNTS})

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """An entry a row, as skipped_rows.jsonl has them; rows are counted from 0, lines of the file from 1."""
        lines = self.rows.lines
        place = {e.row: {"row": e.row} if lines is None else {"row": e.row, "line": lines[e.row]} for e in self.errors}
        return [{"data": self.name, **place[e.row], "reason": e.reason} for e in self.errors]

    def check_left(self, max_length: int | None) -> None:
        """Raise UserError where no example remains."""
        if self.examples:
            return
        if self.found and len(self.found) == (count := len(self.rows)):
            none = "its only row cannot" if count == 1 else f"none of its {counted(count, 'row')} can"
            raise UserError(f"{self.name}: {none} be used: {count_reasons(self.errors)}")
        raise UserError(
            f"{self.name}: no example is left, since none has room for a token to learn, or to sample, behind its "
            f"prompt within max_length={max_length}: raise max_length"
        )

    def __str__(self) -> str:
        errors = self.errors
        notes = {
            f"{(self.labels or (0,))[0]} of them desirable": self.labels,
            f"{self.weighted} of them with weights other than 1": self.weighted,
            f"{counted(len(errors), 'row')} skipped ({count_reasons(errors)})": errors,
            f"{self.dropped} dropped, without room for a completion within max_length": self.dropped,
            f"{counted(self.truncated, 'completion')} truncated by {counted(self.tokens_cut, 'token')} in all": (
                self.truncated
            ),
            f"{counted(self.identical, 'pair')} with identical chosen and rejected": self.identical,
            f"{self.moved} whose prompt ends in other tokens once its completion follows": self.moved,
            f"{self.begun} whose prompt ends with an assistant's turn, which a turn of its own follows": self.begun,
            f"{self.special} whose own text has special tokens, which are read as such": self.special,
        }
        counts = [note for note, there_are in notes.items() if there_are]
        return "; ".join([f"{self.name}: {counted(self.examples, 'example')}", *counts])
