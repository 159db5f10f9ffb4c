"""Rows of a data set become `Example`s: a prompt's token ids and those of its completions.

What a row needs to have, by the kind of the loss (`losses.Kind`), as plain text or as conversations:

    SEQUENCE  prompt + completion | messages | text; perhaps weight, see `token_weights.py`
    PAIRED    prompt + chosen + rejected | chosen + rejected, which begin with the same prompt; reference (TPO)
    LABELED   prompt + completion + label | pairs, each of which becomes two rows
    GROUPED   prompt, and further columns for the rewards (`prepare_prompts`)

Ids and masks are those of TRL 1.16 (`tokenization.py`). Differs from TRL: a row that could only be trained on by
accident (no text, no label, roles out of order) is an error that names it, not a warning or a crash further on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from logratio.losses import Kind

from ..errors import UserError
from .columns import Source, read_sources
from .rows import Rows, load_rows
from .token_weights import has_weights, token_weights
from .tokenization import Encoder, Text, check_tokenizer, common_prefix, is_conversation, with_eos

__all__ = ["Completion", "Example", "Prompt", "Report", "Rows", "load_rows", "prepare", "prepare_prompts"]

_BATCH = 1000  # rows tokenized by one call, which uses all cores


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
    """

    prompt_ids: list[int]
    prompt: Text
    columns: dict[str, Any]
    row: int = -1


@dataclass
class Report:
    """What became of the rows; `str(report)` is one line.

    examples: that remain. truncated: completions cut at `max_length`, by `tokens_cut` tokens together. dropped:
    examples without a scored token within `max_length`. identical: pairs whose two completions are the same tokens,
    from which nothing can be learned. moved: examples whose prompt, tokenized alone, ends otherwise than with its
    completion behind it, so that the completion starts where the two part. begun: examples whose prompt ends with an
    assistant's turn. special: examples whose own text has special tokens, which are read as such. weighted: examples
    with weights other than 1. labels: (True, False) counts.
    """

    name: str
    examples: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    dropped: int = 0
    identical: int = 0
    moved: int = 0
    begun: int = 0
    special: int = 0
    weighted: int = 0
    labels: tuple[int, int] | None = None

    def note(self, source: Source, encoder: Encoder) -> None:
        """Count what a row has before any of it is cut."""
        prompt = source.prompt
        self.begun += isinstance(prompt, list) and prompt[-1]["role"] == "assistant"
        self.special += encoder.count_special([*([] if prompt is None else [prompt]), *source.completions]) > 0

    def __str__(self) -> str:
        notes = [f"{self.name}: {self.examples} examples"]
        if self.labels:
            notes.append(f"{self.labels[0]} of them desirable")
        if self.weighted:
            notes.append(f"{self.weighted} of them with weights other than 1")
        if self.dropped:
            notes.append(f"{self.dropped} dropped, with nothing scored within max_length")
        if self.truncated:
            notes.append(f"{self.truncated} completions truncated by {self.tokens_cut} tokens in all")
        if self.identical:
            notes.append(f"{self.identical} pairs with identical chosen and rejected")
        if self.moved:
            notes.append(f"{self.moved} whose prompt ends in other tokens once its completion follows")
        if self.begun:
            notes.append(f"{self.begun} whose prompt ends with an assistant's turn, which a turn of its own follows")
        if self.special:
            notes.append(f"{self.special} whose own text has special tokens, which are read as such")
        return "; ".join(notes)


def prepare(
    rows: Rows,
    kind: Kind,
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    gold: bool = False,
) -> tuple[list[Example], Report]:
    """Tokenize rows of sequences, pairs or labeled completions.

    max_length: of a prompt and one completion together, in tokens; the start is kept. None: no limit.
    completion_only_loss: of sequences; None: score the completion only where rows have one, all of the text otherwise.
    assistant_only_loss: of sequences; score only what the chat template marks as the assistant's.
    gold: of pairs; a third completion, from the column `reference`.

    Raises UserError for a row that cannot be used, and where no example remains.
    """
    if kind == Kind.GROUPED:
        raise ValueError("prompts to generate from have no completions yet: use prepare_prompts")
    first = next(read_sources(rows, kind, gold=gold))
    check_tokenizer(
        tokenizer, conversational=is_conversation(first.completions[0]), assistant_only_loss=assistant_only_loss
    )
    if completion_only_loss and first.prompt is None:
        raise UserError(
            f"completion_only_loss needs the columns prompt and completion, but {rows.name} has whole texts: "
            "leave it out, or use assistant_only_loss with conversations"
        )
    report = Report(rows.name)
    encoder = Encoder(tokenizer)
    examples: list[Example] = []
    for batch in _batches(read_sources(rows, kind, gold=gold)):
        prompts, wholes = _tokenize(encoder, batch, rows)
        for source, prompt, whole in zip(batch, prompts, wholes, strict=True):
            place = rows.where(source.row)
            report.note(source, encoder)
            if kind == Kind.SEQUENCE:
                # TRL's default: the completion where there is one, else everything.
                masked_prompt = None if completion_only_loss is False else prompt
                text = _wholes(source, tokenizer)[0]
                marked = assistant_only_loss or has_weights(text)
                mask = encoder.assistant_mask(text, source.options, place) if marked else None
                weights = token_weights(source.weight, text, mask, len(whole[0]), place)
                mask = mask if assistant_only_loss else None
                example = _sequence(source, masked_prompt, whole[0], mask, weights, max_length, place, report)
            else:
                example = _shared_prompt(source, prompt or [], whole, max_length, place, report)
            if example is not None:
                examples.append(example)
    report.examples = len(examples)
    if kind == Kind.LABELED:
        desirable = sum(example.label is True for example in examples)
        report.labels = (desirable, len(examples) - desirable)
    _check_left(report, max_length)
    return examples, report


def prepare_prompts(rows: Rows, tokenizer: Any, *, max_length: int | None = None) -> tuple[list[Prompt], Report]:
    """Tokenize prompts to generate from; one that has `max_length` tokens or more is dropped and counted."""
    first = next(read_sources(rows, Kind.GROUPED))
    assert first.prompt is not None
    check_tokenizer(tokenizer, conversational=is_conversation(first.prompt))
    names = [name for name in rows.rows[0] if name != "prompt"]
    report = Report(rows.name)
    encoder = Encoder(tokenizer)
    prompts = []
    for batch in _batches(read_sources(rows, Kind.GROUPED)):
        for source, ids in zip(batch, _tokenize(encoder, batch, rows, to_generate=True)[0], strict=True):
            place = rows.where(source.row)
            report.note(source, encoder)
            if not ids:
                raise UserError(f"{place}: the prompt has no tokens: give it text")
            if max_length is not None and len(ids) >= max_length:
                report.dropped += 1
                continue
            columns = {name: value for name, value in rows.rows[source.row].items() if name != "prompt"}
            if columns.keys() != set(names):
                raise UserError(
                    f"{place} has the columns {', '.join(['prompt', *columns])}, the first row "
                    f"{', '.join(['prompt', *names])}: rewards need the same of all rows, null where there is nothing"
                )
            prompts.append(Prompt(ids, source.prompt or "", columns, source.row))
    report.examples = len(prompts)
    _check_left(report, max_length)
    return prompts, report


def _batches(sources: Iterator[Source]) -> Iterator[list[Source]]:
    while batch := list(islice(sources, _BATCH)):
        yield batch


def _wholes(source: Source, tokenizer: Any) -> list[Any]:
    """The prompt with each of its completions, in one piece; EOS closes plain text only."""
    prompt: Any = source.prompt
    return [
        (prompt or "") + with_eos(completion, tokenizer) if isinstance(completion, str) else (prompt or []) + completion
        for completion in source.completions
    ]


def _tokenize(
    encoder: Encoder, batch: list[Source], rows: Rows, *, to_generate: bool = False
) -> tuple[list[list[int] | None], list[list[list[int]]]]:
    """Ids of each row's prompt alone (None where it has none), and of its prompt with each completion."""
    with_prompt = [source for source in batch if source.prompt is not None]
    prompts = encoder.prompts(
        [source.prompt for source in with_prompt if source.prompt is not None],
        [source.options for source in with_prompt],
        [rows.where(source.row) for source in with_prompt],
        to_generate=to_generate,
    )
    pieces = [(whole, source) for source in batch for whole in _wholes(source, encoder.tokenizer)]
    wholes = iter(
        encoder.wholes(
            [whole for whole, _ in pieces],
            [source.options for _, source in pieces],
            [rows.where(source.row) for _, source in pieces],
        )
    )
    return (
        list(prompts) if with_prompt else [None] * len(batch),
        [[next(wholes) for _ in source.completions] for source in batch],
    )


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


def _check_left(report: Report, max_length: int | None) -> None:
    if not report.examples:
        raise UserError(
            f"{report.name}: no example is left, since none has a token to learn within max_length={max_length}: "
            "raise max_length"
        )
