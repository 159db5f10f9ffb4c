"""Rows of a data set become `Example`s: a prompt's token ids and those of its completions.

What a row needs to have, by the kind of the loss (`losses.Kind`), as plain text or as conversations:

    SEQUENCE  prompt + completion | messages | conversations (ShareGPT) | text; perhaps weight, see `token_weights.py`
    PAIRED    prompt + chosen + rejected | chosen + rejected, which begin with the same prompt; reference (TPO)
    LABELED   prompt + completion + label | pairs, each of which becomes two rows
    LISTED    prompt + completions + rewards | completions + rewards; lists, equally long, of two at least
    GROUPED   prompt, and further columns for the rewards (`prepare_prompts`)

Ids and masks are those of TRL 1.16 (`tokenization.py`). Differs from TRL: a row that could only be trained on by
accident (no text, no label, roles out of order) is an error that names it, not a warning or a crash further on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from logratio.losses import Kind

from ..errors import UserError
from .columns import Source
from .layout import find_layout
from .report import BadRows, Report
from .rows import Rows, load_rows
from .token_weights import has_weights, token_weights
from .tokenization import Encoder, check_tokenizer, common_prefix
from .tokenized import tokenized, whole_texts
from .types import Completion, Example, Prompt

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


class Preparation:
    """How the rows of one data set become examples, or prompts (kind GROUPED): in what columns they are, and the checks
    that need no more than the first of them. Arguments as `prepare` has them."""

    def __init__(
        self,
        rows: Rows,
        kind: Kind,
        tokenizer: Any,
        *,
        max_length: int | None,
        completion_only_loss: bool | None = None,
        assistant_only_loss: bool = False,
        gold: bool = False,
        margin: bool = False,
        on_bad_row: OnBadRow = "error",
    ) -> None:
        self.rows, self.kind, self.max_length = rows, kind, max_length
        self.completion_only_loss, self.assistant_only_loss = completion_only_loss, assistant_only_loss
        self.bad = BadRows(rows, skip=on_bad_row == "skip")
        self.layout = find_layout(self.bad, kind, gold=gold, margin=margin)
        check_tokenizer(tokenizer, conversational=self.layout.conversational, assistant_only_loss=assistant_only_loss)
        if completion_only_loss and self.layout.prompt is None:
            raise UserError(
                f"completion_only_loss needs the columns prompt and completion, but {rows.name} has whole texts: "
                "leave it out, or use assistant_only_loss with conversations"
            )
        for name in self.layout.names if kind is Kind.GROUPED else ():
            if name in REWARD_ARGUMENTS:
                raise UserError(
                    f"{rows.name} has the column {name!r}, a name by which rewards are given something else: "
                    "rename the column"
                )
        self.encoder = Encoder(tokenizer)
        self.report = Report(rows.name, bad=self.bad)

    def made(self, start: int = 0, stop: int | None = None) -> Iterator[Example | Prompt]:
        """What the rows from `start` to `stop` become, in their order, counted in `report`.

        Raises UserError at the first row that cannot be used, unless these are skipped.
        """
        for source, prompt, wholes in tokenized(self.encoder, self.bad, self.layout, start, stop):
            own = Report(self.rows.name)
            place = self.rows.where(source.row)
            made: Sequence[Example | Prompt]
            try:
                if self.kind is Kind.GROUPED:
                    made = _prompts(source, prompt or [], self, place, own)
                else:
                    made = _examples(source, prompt, wholes, self, place, own)
            except UserError as error:
                self.bad.take(error, source.row)
                continue
            own.count(made)
            self.report.add(own)
            yield from made

    def comes_late(self, made: Example | Prompt) -> bool:
        """Whether it stands behind all that does not: the undesirable halves of pairs for a kind of labeled rows."""
        return self.kind is Kind.LABELED and not self.layout.labeled and made.label is False  # type: ignore[union-attr]


def prepare(
    rows: Rows,
    kind: Kind,
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    gold: bool = False,
    margin: bool = False,
    on_bad_row: OnBadRow = "error",
) -> tuple[list[Example], Report]:
    """Tokenize rows of sequences, pairs, labeled completions or lists.

    max_length: of a prompt and one completion together, in tokens; the start is kept. None: no limit.
    completion_only_loss: of sequences; None: score the completion only where rows have one, all of the text otherwise.
    assistant_only_loss: of sequences; score only what the chat template marks as the assistant's.
    gold: of pairs; a third completion, from the column `reference`. margin: of pairs; by how much chosen is better.
    on_bad_row: skip leaves out the rows that cannot be used; the report counts and lists them.

    Raises UserError for a row that cannot be used, and where no example remains. Pairs for a kind of labeled rows
    become a desirable example each, and after all of these an undesirable one each.
    """
    if kind == Kind.GROUPED:
        raise ValueError("prompts to generate from have no completions yet: use prepare_prompts")
    preparation = Preparation(
        rows,
        kind,
        tokenizer,
        max_length=max_length,
        completion_only_loss=completion_only_loss,
        assistant_only_loss=assistant_only_loss,
        gold=gold,
        margin=margin,
        on_bad_row=on_bad_row,
    )
    examples = [example for example in preparation.made() if isinstance(example, Example)]
    preparation.report.check_left(max_length)
    return sorted(examples, key=preparation.comes_late), preparation.report


def prepare_prompts(
    rows: Rows, tokenizer: Any, *, max_length: int | None = None, on_bad_row: OnBadRow = "error"
) -> tuple[list[Prompt], Report]:
    """Tokenize prompts to generate from; one that has `max_length` tokens or more is dropped and counted."""
    preparation = Preparation(rows, Kind.GROUPED, tokenizer, max_length=max_length, on_bad_row=on_bad_row)
    prompts = [prompt for prompt in preparation.made() if isinstance(prompt, Prompt)]
    preparation.report.check_left(max_length)
    return prompts, preparation.report


def _note(source: Source, encoder: Encoder, report: Report) -> None:
    """Count what is said of a row's text, whatever is cut of it."""
    prompt = source.prompt
    report.begun += isinstance(prompt, list) and prompt[-1]["role"] == "assistant"
    report.special += encoder.count_special([*([] if prompt is None else [prompt]), *source.completions]) > 0


def _prompts(source: Source, ids: list[int], preparation: Preparation, place: str, report: Report) -> list[Prompt]:
    """What one row becomes: a prompt, or none."""
    if not ids:
        raise UserError(f"{place}: the prompt has no tokens: give it text")
    columns = {name: value for name, value in source.columns.items() if name != "prompt"}
    names = [name for name in preparation.layout.names if name != "prompt"]
    if columns.keys() != set(names):
        raise UserError(
            f"{place} has the columns {', '.join(['prompt', *columns])}, the first row "
            f"{', '.join(['prompt', *names])}: rewards need the same of all rows, null where there is nothing"
        )
    if preparation.max_length is not None and len(ids) >= preparation.max_length:
        report.dropped += 1
        return []
    _note(source, preparation.encoder, report)
    return [Prompt(ids, source.prompt or "", columns, source.row)]


def _examples(
    source: Source,
    prompt: list[int] | None,
    wholes: list[list[int]],
    options: Preparation,
    place: str,
    report: Report,
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
    tail one completion tokenizes otherwise, is compared with what the others have in its place."""
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
    report.identical += len(completions) > 1 and source.rewards is None and completions[0] == completions[1]
    weighted = source.weight != 1
    report.weighted += weighted
    return Example(
        wholes[0][:start],
        [Completion(ids, weights=[source.weight] * len(ids) if weighted else None) for ids in completions],
        source.label,
        source.row,
        margin=source.margin,
        rewards=source.rewards,
    )
