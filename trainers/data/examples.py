"""Rows of a data set become `Example`s: a prompt's token ids and those of its completions.

What a row needs to have, by the kind of the loss (`losses.Kind`), as plain text or as conversations:

    SEQUENCE  prompt + completion | messages | conversations (ShareGPT) | text; perhaps weight, see `token_weights.py`
    PAIRED    prompt + chosen + rejected | chosen + rejected, which begin with the same prompt; reference (TPO)
    LABELED   prompt + completion + label | pairs, each of which becomes two rows
    GROUPED   prompt, and further columns for the rewards (`prepare_prompts`)

Ids and masks are those of TRL 1.16 (`tokenization.py`). Differs from TRL: a row that could only be trained on by
accident (no text, no label, roles out of order) is an error that names it, not a warning or a crash further on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from logratio.losses import Kind

from ..errors import UserError
from .columns import Layout, Source, find_layout
from .report import BadRows, Report
from .rows import Rows, load_rows
from .token_weights import has_weights, token_weights
from .tokenization import Encoder, Text, check_tokenizer, common_prefix
from .tokenized import tokenized, whole_texts

__all__ = ["Completion", "Example", "Prompt", "Report", "Rows", "load_rows", "prepare", "prepare_prompts"]

OnBadRow = Literal["error", "skip"]
# What rewards are given beside the data set's columns.
REWARD_ARGUMENTS = (
    "completion_ids",
    "completions",
    "log_extra",
    "log_metric",
    "max_completion_length",
    "prompts",
    "trainer_state",
)


@dataclass(frozen=True, slots=True)
class Completion:
    """Token ids that follow a prompt. scored: which of them the loss sees, same length; None: all of them.

    weights: what each of them weighs in the loss (SFT), same length; None: 1 each.
    """

    ids: list[int]
    scored: list[bool] | None = None
    weights: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """What every method trains on: a prompt and its completions.

    prompt_ids: never empty, so that every scored token has a predecessor.
    completions: one (SFT, KTO), chosen and rejected (DPO, CPO, ORPO), these and gold (TPO), or rollouts (GRPO). Of the
        data set's, none is without a scored token.
    label: True where the completion is desirable (KTO). advantages: one a completion (GRPO).
    row: index in the data set, for messages.
    """

    prompt_ids: list[int]
    completions: list[Completion]
    label: bool | None = None
    row: int = -1
    advantages: tuple[float, ...] | None = None

    def take(self, completions: Sequence[int]) -> Example:
        """The same prompt with some of its completions."""
        kept = [self.completions[i] for i in completions]
        advantages = None if self.advantages is None else tuple(self.advantages[i] for i in completions)
        return Example(self.prompt_ids, kept, self.label, self.row, advantages)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to generate from (GRPO).

    prompt: as the data set has it, text or messages; rewards are called with it.
    columns: the row's further columns, handed to rewards by name.
    occurrence: which one it is of those that an optimizer step has of the row.
    """

    prompt_ids: list[int]
    prompt: Text
    columns: dict[str, Any]
    row: int = -1
    occurrence: int = 0


@dataclass(frozen=True, slots=True)
class _Options:
    """What `prepare` was asked for, and what its rows become examples with."""

    encoder: Encoder
    kind: Kind
    max_length: int | None
    completion_only_loss: bool | None
    assistant_only_loss: bool


def prepare(
    rows: Rows,
    kind: Kind,
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    gold: bool = False,
    on_bad_row: OnBadRow = "error",
) -> tuple[list[Example], Report]:
    """Tokenize rows of sequences, pairs or labeled completions.

    max_length: of a prompt and one completion together, in tokens; the start is kept. None: no limit.
    completion_only_loss: of sequences; None: score the completion only where rows have one, all of the text otherwise.
    assistant_only_loss: of sequences; score only what the chat template marks as the assistant's.
    gold: of pairs; a third completion, from the column `reference`.
    on_bad_row: skip leaves out the rows that cannot be used; the report counts and lists them.

    Raises UserError for a row that cannot be used, and where no example remains. Pairs for a kind of labeled rows
    become a desirable example each, and after all of these an undesirable one each.
    """
    if kind == Kind.GROUPED:
        raise ValueError("prompts to generate from have no completions yet: use prepare_prompts")
    bad = BadRows(rows, skip=on_bad_row == "skip")
    layout = find_layout(bad, kind, gold=gold)
    check_tokenizer(tokenizer, conversational=layout.conversational, assistant_only_loss=assistant_only_loss)
    if completion_only_loss and layout.prompt is None:
        raise UserError(
            f"completion_only_loss needs the columns prompt and completion, but {rows.name} has whole texts: "
            "leave it out, or use assistant_only_loss with conversations"
        )
    options = _Options(Encoder(tokenizer), kind, max_length, completion_only_loss, assistant_only_loss)
    report = Report(rows.name, bad=bad)
    examples: list[Example] = []
    undesirable: list[Example] = []
    for source, prompt, wholes in tokenized(options.encoder, bad, layout):
        own = Report(rows.name)
        try:
            made = _examples(source, prompt, wholes, options, rows.where(source.row), own)
        except UserError as error:
            bad.take(error, source.row)
            continue
        report.add(own)
        examples += made if layout.labeled else [example for example in made if example.label is not False]
        undesirable += [] if layout.labeled else [example for example in made if example.label is False]
    examples += undesirable
    report.examples = len(examples)
    if kind == Kind.LABELED:
        desirable = sum(example.label is True for example in examples)
        report.labels = (desirable, len(examples) - desirable)
    report.check_left(max_length)
    return examples, report


def prepare_prompts(
    rows: Rows, tokenizer: Any, *, max_length: int | None = None, on_bad_row: OnBadRow = "error"
) -> tuple[list[Prompt], Report]:
    """Tokenize prompts to generate from; one that has `max_length` tokens or more is dropped and counted."""
    bad = BadRows(rows, skip=on_bad_row == "skip")
    layout = find_layout(bad, Kind.GROUPED)
    check_tokenizer(tokenizer, conversational=layout.conversational)
    for name in layout.names:
        if name in REWARD_ARGUMENTS:
            raise UserError(
                f"{rows.name} has the column {name!r}, a name by which rewards are given something else: "
                "rename the column"
            )
    report = Report(rows.name, bad=bad)
    prompts = []
    encoder = Encoder(tokenizer)
    for source, ids, _ in tokenized(encoder, bad, layout):
        try:
            prompt = _prompt(source, ids or [], layout, rows.where(source.row))
        except UserError as error:
            bad.take(error, source.row)
            continue
        if max_length is not None and len(prompt.prompt_ids) >= max_length:
            report.dropped += 1
        else:
            prompts.append(prompt)
            _note(source, encoder, report)
    report.examples = len(prompts)
    report.check_left(max_length)
    return prompts, report


def _note(source: Source, encoder: Encoder, report: Report) -> None:
    """Count what is said of a row's text, whatever is cut of it."""
    prompt = source.prompt
    report.begun += isinstance(prompt, list) and prompt[-1]["role"] == "assistant"
    report.special += encoder.count_special([*([] if prompt is None else [prompt]), *source.completions]) > 0


def _prompt(source: Source, ids: list[int], layout: Layout, place: str) -> Prompt:
    if not ids:
        raise UserError(f"{place}: the prompt has no tokens: give it text")
    columns = {name: value for name, value in source.columns.items() if name != "prompt"}
    names = [name for name in layout.names if name != "prompt"]
    if columns.keys() != set(names):
        raise UserError(
            f"{place} has the columns {', '.join(['prompt', *columns])}, the first row "
            f"{', '.join(['prompt', *names])}: rewards need the same of all rows, null where there is nothing"
        )
    return Prompt(ids, source.prompt or "", columns, source.row)


def _examples(
    source: Source, prompt: list[int] | None, wholes: list[list[int]], options: _Options, place: str, report: Report
) -> list[Example]:
    """What one row becomes: an example, two of a pair that is taken apart, or none."""
    max_length = options.max_length
    _note(source, options.encoder, report)
    if options.kind == Kind.LABELED and source.label is None:
        labeled = [dataclasses.replace(source, label=label) for label in (True, False)]
        parts = [
            _shared_prompt(part, prompt or [], [whole], max_length, place, report)
            for part, whole in zip(labeled, wholes, strict=True)
        ]
        return [example for example in parts if example is not None]
    if options.kind != Kind.SEQUENCE:
        example = _shared_prompt(source, prompt or [], wholes, max_length, place, report)
        return [] if example is None else [example]
    # TRL's default: the completion where there is one, else everything.
    masked_prompt = None if options.completion_only_loss is False else prompt
    text = whole_texts(source, options.encoder.tokenizer)[0]
    marked = options.assistant_only_loss or has_weights(text)
    mask = options.encoder.assistant_mask(text, source.options, place) if marked else None
    weights = token_weights(source.weight, text, mask, len(wholes[0]), place)
    mask = mask if options.assistant_only_loss else None
    example = _sequence(source, masked_prompt, wholes[0], mask, weights, max_length, place, report)
    return [] if example is None else [example]


def _sequence(
    source: Source,
    prompt: list[int] | None,
    whole: list[int],
    mask: list[bool] | None,
    weights: list[float] | None,
    max_length: int | None,
    place: str,
    report: Report,
) -> Example | None:
    """One completion that begins at the first scored token. prompt: ids that are not scored; None: score all."""
    start = 0 if prompt is None else common_prefix(prompt, whole)
    report.moved += prompt is not None and start < len(prompt)
    scored = [index >= start and (mask is None or mask[index]) for index in range(len(whole))]
    if not any(scored):
        what = "no assistant's turn that the chat template marks" if mask else "no tokens after its prompt"
        raise UserError(f"{place} has {what}: nothing in it can be learned")
    kept = whole if max_length is None else whole[:max_length]
    # The first token of all has no predecessor to be predicted from, so it is never scored.
    first = next((index for index in range(1, len(kept)) if scored[index]), None)
    if first is None:
        report.dropped += 1
        return None
    report.truncated += len(kept) < len(whole)
    report.tokens_cut += len(whole) - len(kept)
    rest = scored[first : len(kept)]
    weights = None if weights is None else weights[first : len(kept)]
    report.weighted += weights is not None
    return Example(kept[:first], [Completion(kept[first:], None if all(rest) else rest, weights)], row=source.row)


def _shared_prompt(
    source: Source, prompt: list[int], wholes: list[list[int]], max_length: int | None, place: str, report: Report
) -> Example | None:
    """Completions, scored from where the first of them parts from the prompt's ids, as in TRL: what of the prompt's
    tail one completion tokenizes otherwise, is compared with what the other one has in its place."""
    start = min(common_prefix(prompt, whole) for whole in wholes)
    report.moved += start < len(prompt)
    if start == 0:  # no prompt, and a tokenizer without BOS
        if len({whole[0] for whole in wholes if whole}) != 1:
            raise UserError(
                f"{place} has an empty prompt, and its completions differ from their first token on, which then "
                "cannot be predicted from anything: give it a prompt, or use a tokenizer that adds a BOS token"
            )
        start = 1
    if any(len(whole) <= start for whole in wholes):
        raise UserError(f"{place} has a completion without tokens after its prompt: nothing in it can be learned")
    if max_length is not None and start >= max_length:
        report.dropped += 1
        return None
    completions = [whole[start:max_length] for whole in wholes]
    for whole, ids in zip(wholes, completions, strict=True):
        cut = len(whole) - start - len(ids)
        report.truncated += cut > 0
        report.tokens_cut += cut
    report.identical += len(completions) > 1 and completions[0] == completions[1]
    return Example(wholes[0][:start], [Completion(ids) for ids in completions], source.label, source.row)
