"""A row's columns, checked: each of the type that it must have, and all in the data set's layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from logratio.losses import Kind

from ..errors import RowError, UserError, shown
from ..ground.finite import is_finite
from .chat.conversations import as_messages, check_media, check_value, is_written_out, template_options, with_system
from .layout import GOLD, Layout, columns_of
from .lists import REWARDS, taken_apart
from .report import Report
from .tokenization import Text, check_messages, implicit_prompt, is_conversation


@dataclass(frozen=True, slots=True)
class Source:
    """One checked row before tokenization.

    prompt: None where `text` or `messages` are one piece, which then is the only completion.
    options: what its chat template is given beside the messages (`tools`, `chat_template_kwargs`).
    label: None too for a pair, which a kind of labeled rows takes apart.
    weight: of every token of a sequence, or of a labeled completion, from the column of that name.
    margin: by how much chosen is better, from the column of that name, where it is read.
    rewards: one a completion, of lists.
    columns: all that the row has.
    """

    row: int
    prompt: Text | None
    completions: list[Text]
    options: dict[str, Any]
    columns: Mapping[str, Any]
    label: bool | None = None
    weight: float = 1.0
    margin: float | None = None
    rewards: tuple[float, ...] | None = None


def read_sources(report: Report, layout: Layout, start: int = 0, stop: int | None = None) -> Iterator[Source]:
    """The rows of one data set from `start` to `stop`, all in the columns and the format (plain or conversational) of
    `layout`.

    A row that cannot be used is a UserError that names its place and column, given to `report`.
    """
    for index, row in report.rows.between(start, stop):
        try:
            if isinstance(row, RowError):
                raise row
            source = _read(row, report.rows.where(index), index, layout)
        except UserError as error:
            report.take(error, index)
        else:
            yield source


def _read(row: Mapping[str, Any], where: str, index: int, layout: Layout) -> Source:
    beside = ["label"] if layout.labeled else [REWARDS] if layout.kind is Kind.LISTED else []
    needed = (*layout.texts, *beside)
    for column in needed:
        if row.get(column) is None:
            raise UserError(f"{where} lacks {column!r}, which the first row has: fill it in or remove the row")
    better = columns_of(row, layout.kind) or ()
    if more := [column for column in better if column not in needed]:
        raise UserError(
            f"{where} has {' and '.join(map(repr, more))}, which the first row lacks and which would not be read: "
            "give all rows the same columns"
        )
    check_media(row, where)
    rewards = None
    if layout.kind is Kind.LISTED:
        row, names, rewards = taken_apart(row, where)
        layout = replace(layout, completions=names)
    texts = {column: _text(row, column, where, layout) for column in layout.texts}
    prompt, completions = _parts(texts, where, layout)
    for column, completion in zip(layout.completions, completions, strict=True):
        _check_completion(completion, f"{where}: {column!r}")
    label = row["label"] if layout.labeled else None
    if label is not None and not isinstance(label, bool):
        raise UserError(f"{where}: 'label' must be true or false, got {shown(label)}")
    weight = row.get("weight") if layout.kind in (Kind.SEQUENCE, Kind.LABELED) else None
    return Source(
        index,
        prompt,
        completions,
        template_options(row, where) if layout.conversational else {},
        row,
        label,
        1.0 if weight is None else checked_weight(weight, where),
        _margin(row, where, layout),
        rewards,
    )


def _margin(row: Mapping[str, Any], where: str, layout: Layout) -> float | None:
    """The column `margin` of pairs; UserError where it is missed, of no use, or not read."""
    value = row.get("margin") if layout.kind in (Kind.PAIRED, Kind.LABELED) else None
    if value is None and layout.margin:
        raise UserError(
            f"{where} has no 'margin', by how much chosen is better, which this loss_type compares with: add the "
            "column, or use a loss_type without it, as sigmoid"
        )
    if value is not None and not layout.margin:
        raise UserError(
            f"{where} has a 'margin', which this method and loss_type do not read: remove the column, or use dpo with "
            "loss_type odpo"
        )
    if value is not None and not is_finite(value):
        raise UserError(f"{where}: 'margin' must be a finite number, got {shown(value)}")
    return value if value is None else float(value)


def _text(row: Mapping[str, Any], column: str, where: str, layout: Layout) -> Text:
    """A cell as text or messages, whichever the data set has."""
    value, place = row[column], f"{where}: {column!r}"
    if not layout.conversational:
        check_value(value, place)
        _check_plain(row, column, where, layout)
        return value
    value = as_messages(value, place)
    if column == "conversations":
        value = with_system(value, row.get("system"), where)
    check_value(value, place)
    if not is_conversation(value):
        raise UserError(
            f"{place} must be a list of messages{'' if column == 'messages' else ', as in the first row'}, "
            f"got {shown(value)}"
        )
    return value


def _check_plain(row: Mapping[str, Any], column: str, where: str, layout: Layout) -> None:
    value, prompt = row[column], row[layout.prompt] if layout.prompt else None
    if is_conversation(value) and column != layout.prompt and isinstance(prompt, str):
        turn = as_messages(value, where)[:1]
        begins = bool(turn) and turn[0].get("content") == prompt
        remedy = "which begins with it: remove" if begins else "give the prompt as messages too, or remove"
        raise UserError(
            f"{where}: {layout.prompt!r} is text, {column!r} a conversation, {remedy} the column {layout.prompt!r}"
        )
    if not isinstance(value, str) or (column == "prompt" and is_written_out(value)):
        raise UserError(
            f"{where}: {column!r} must be text or a list of messages, and the same in all rows, got {shown(value)}"
        )


def _parts(texts: dict[str, Text], where: str, layout: Layout) -> tuple[Text | None, list[Text]]:
    """The prompt and what follows it; pairs and lists without a prompt share one."""
    completions = [texts[column] for column in layout.completions]
    if layout.prompt is None:
        if len(completions) == 1:
            return None, completions
        for column in layout.completions:
            _check_completion(texts[column], f"{where}: {column!r}")
        compared = completions if layout.kind is Kind.LISTED else completions[:2]
        cut = min(implicit_prompt(compared[0], other) for other in compared[1:])
        prompt = completions[0][:cut]
        completions = [_behind(text, prompt, where) for text in completions]
    else:
        prompt = texts[layout.prompt]
    if not isinstance(prompt, str):
        check_messages(prompt, f"{where}: the prompt")
        for column in layout.completions if layout.prompt else ():
            if texts[column][: len(prompt)] == prompt:
                raise UserError(
                    f"{where}: {column!r} begins with the prompt's messages again: leave them out there, or remove the "
                    f"column {layout.prompt!r}"
                )
    return prompt, completions


def _behind(text: Text, prompt: Text, where: str) -> Text:
    if text[: len(prompt)] != prompt:
        raise UserError(
            f"{where}: {GOLD!r} does not begin with the prompt that 'chosen' and 'rejected' share: "
            "let it begin alike, or put the prompt in a column of its own"
        )
    return text[len(prompt) :]


def checked_weight(value: Any, place: str) -> float:
    """`value` as a weight; UserError unless it is a finite number, 0 or above."""
    if not is_finite(value) or value < 0:
        raise UserError(f"{place}: 'weight' must be a finite number, 0 or above, got {shown(value)}")
    return float(value)


def _check_completion(completion: Text, place: str) -> None:
    if isinstance(completion, str):
        if not completion.strip():
            raise UserError(f"{place} has no text to learn from: fill it in or remove the row")
        return
    check_messages(completion, place)
    if not any(message["role"] == "assistant" for message in completion):
        raise UserError(f"{place} has no assistant's turn to learn from: add one or remove the row")
