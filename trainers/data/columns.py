"""A row's columns, checked: what must be there for each kind of loss, and of which type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from logratio.losses import Kind

from ..errors import UserError, shown
from .messages import template_options
from .rows import Rows
from .tokenization import Text, check_messages, implicit_prompt, is_conversation

# For each kind the sets of columns that will do, the preferred one first.
COLUMNS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    Kind.SEQUENCE: (("prompt", "completion"), ("messages",), ("text",)),
    Kind.PAIRED: (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    Kind.LABELED: (("prompt", "completion", "label"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    Kind.GROUPED: (("prompt",),),
}
GOLD = "reference"  # the third, gold completion beside chosen and rejected (TPO)


@dataclass(frozen=True, slots=True)
class Source:
    """One checked row before tokenization.

    prompt: None where `text` or `messages` are one piece, which then is the only completion.
    options: what its chat template is given beside the messages (`tools`, `chat_template_kwargs`).
    weight: of every token of a sequence, from the column of that name.
    """

    row: int
    prompt: Text | None
    completions: list[Text]
    options: dict[str, Any]
    label: bool | None = None
    weight: float = 1.0


def read_sources(rows: Rows, kind: Kind, *, gold: bool = False) -> Iterator[Source]:
    """The rows of one data set, all in the columns and the format (plain or conversational) of its first row.

    Raises UserError at a row that cannot be used, naming its place and column. Pairs for a kind of labeled rows
    become a desirable row each, and after all of these an undesirable one each. gold: pairs have a third completion.
    """
    first = rows.rows[0]
    columns = next((columns for columns in COLUMNS[kind] if all(first.get(c) is not None for c in columns)), None)
    if columns is not None and gold:
        if first.get(GOLD) is None:
            raise UserError(
                f"{rows.where(0)} has no {GOLD!r}, the gold completion that this method learns from beside chosen and "
                "rejected: add the column, or use a method that needs pairs alone, as cpo"
            )
        columns = (*columns, GOLD)
    if columns is None:
        expected = ", or ".join(" and ".join(columns) for columns in COLUMNS[kind])
        raise UserError(f"{rows.where(0)} has the columns {', '.join(first) or '(none)'}, expected {expected}")
    conversational = is_conversation(first[columns[0]])
    unpaired = kind == Kind.LABELED and "label" not in columns
    for part in (0, 1) if unpaired else (None,):
        for index, row in enumerate(rows):
            source = _read(row, rows.where(index), index, columns, conversational)
            if part is not None:
                source = Source(index, source.prompt, [source.completions[part]], source.options, part == 0)
            if kind == Kind.SEQUENCE and row.get("weight") is not None:
                source = replace(source, weight=checked_weight(row["weight"], rows.where(index)))
            yield source


def _read(row: Mapping[str, Any], where: str, index: int, columns: tuple[str, ...], conversational: bool) -> Source:
    for column in columns:
        if row.get(column) is None:
            raise UserError(f"{where} lacks {column!r}, which the first row has: fill it in or remove the row")
    texts = [column for column in columns if column != "label"]
    for column in texts:
        _check_format(row[column], f"{where}: {column!r}", conversational)
    options = template_options(row, where, conversational=conversational)
    label = row["label"] if "label" in columns else None
    if label is not None and not isinstance(label, bool):
        raise UserError(f"{where}: 'label' must be true or false, got {shown(label)}")
    if "prompt" not in columns:
        prompt, completions = None, [row[column] for column in texts]
        if len(completions) >= 2:
            cut = implicit_prompt(*completions[:2])
            prompt, completions = (
                completions[0][:cut],
                [_behind(text, completions[0][:cut], where) for text in completions],
            )
    else:
        prompt, completions = row["prompt"], [row[column] for column in texts if column != "prompt"]
    if prompt is not None and conversational:
        check_messages(prompt, f"{where}: the prompt")
    for column, completion in zip([c for c in texts if c != "prompt"], completions, strict=True):
        _check_completion(completion, f"{where}: {column!r}")
    return Source(index, prompt, completions, options, label)


def _behind(text: Text, prompt: Text, where: str) -> Text:
    if text[: len(prompt)] != prompt:
        raise UserError(
            f"{where}: {GOLD!r} does not begin with the prompt that 'chosen' and 'rejected' share: "
            "let it begin alike, or put the prompt in a column of its own"
        )
    return text[len(prompt) :]


def checked_weight(value: Any, place: str) -> float:
    """`value` as a weight; UserError unless it is a finite number, 0 or above."""
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not number or not 0 <= value < float("inf"):
        raise UserError(f"{place}: 'weight' must be a finite number, 0 or above, got {shown(value)}")
    return float(value)


def _check_format(value: Any, place: str, conversational: bool) -> None:
    if conversational and not is_conversation(value):
        raise UserError(f"{place} must be a list of messages, as in the first row, got {shown(value)}")
    if not conversational and not isinstance(value, str):
        raise UserError(f"{place} must be text or a list of messages, and the same in all rows, got {shown(value)}")


def _check_completion(completion: Text, place: str) -> None:
    if isinstance(completion, str):
        if not completion.strip():
            raise UserError(f"{place} has no text to learn from: fill it in or remove the row")
        return
    check_messages(completion, place)
    if not any(message["role"] == "assistant" for message in completion):
        raise UserError(f"{place} has no assistant's turn to learn from: add one or remove the row")
