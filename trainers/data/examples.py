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
from .report import Report
from .rows import Rows, load_rows
from .token_weights import has_weights, token_weights
from .tokenization import Encoder, check_tokenizer, common_prefix
from .tokenized import tokenized, whole_texts
from .types import Completion, Example, Prompt

__all__ = ["Completion", "Example", "Prompt", "Report", "Rows", "load_rows", "prepare", "prepare_prompts"]

OnBadRow = Literal["error", "skip"]
REWARD_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "max_completion_length",
    "trainer_state",
    "log_extra",
    "log_metric",
)
"""What every reward may take by name, beside the columns of the data set."""


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
        self.report = Report(rows, skip=on_bad_row == "skip")
        self.layout = find_layout(self.report, kind, gold=gold, margin=margin)
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

    def made(self, start: int = 0, stop: int | None = None) -> Iterator[Example | Prompt]:
        """What the rows from `start` to `stop` become, in their order, counted in `report`.

        Raises UserError at the first row that cannot be used, unless these are skipped.
        """
        for source, prompt, wholes in tokenized(self.encoder, self.report, self.layout, start, stop):
            own = Report(self.rows)
            place = self.rows.where(source.row)
            made: Sequence[Example | Prompt]
            try:
                if self.kind is Kind.GROUPED:
                    made = self._prompts(source, prompt or [], place, own)
                else:
                    made = self._examples(source, prompt, wholes, place, own)
            except UserError as error:
                self.report.take(error, source.row)
                continue
            own.count(made)
            self.report.add(own)
            yield from made

    def comes_late(self, made: Example | Prompt) -> bool:
        """Whether it stands behind all that does not: the undesirable halves of pairs for a kind of labeled rows."""
        return self.kind is Kind.LABELED and not self.layout.labeled and made.label is False  # type: ignore[union-attr]

    def _note(self, source: Source, report: Report) -> None:
        """Count what is said of a row's text, whatever is cut of it."""
        prompt = source.prompt
        report.begun += isinstance(prompt, list) and prompt[-1]["role"] == "assistant"
        report.special += self.encoder.count_special([*([] if prompt is None else [prompt]), *source.completions]) > 0

    def _prompts(self, source: Source, ids: list[int], place: str, report: Report) -> list[Prompt]:
        """What one row becomes: a prompt, or none."""
        if not ids:
            raise UserError(f"{place}: the prompt has no tokens: give it text")
        columns = {name: value for name, value in source.columns.items() if name != "prompt"}
        names = [name for name in self.layout.names if name != "prompt"]
        if columns.keys() != set(names):
            raise UserError(
                f"{place} has the columns {', '.join(['prompt', *columns])}, the first row "
                f"{', '.join(['prompt', *names])}: rewards need the same of all rows, null where there is nothing"
            )
        if self.max_length is not None and len(ids) >= self.max_length:
            report.dropped += 1
            return []
        self._note(source, report)
        return [Prompt(ids, source.prompt or "", columns, source.row)]

    def _examples(
        self, source: Source, prompt: list[int] | None, wholes: list[list[int]], place: str, report: Report
    ) -> list[Example]:
        """What one row becomes: an example, two of a pair that is taken apart, or none."""
        self._note(source, report)
        if self.kind == Kind.SEQUENCE:
            made = [self._sequence(source, prompt, wholes[0], place, report)]
        elif self.kind == Kind.LABELED and source.label is None:
            made = [
                self._shared_prompt(dataclasses.replace(source, label=label), prompt or [], [whole], place, report)
                for label, whole in zip((True, False), wholes, strict=True)
            ]
        else:
            made = [self._shared_prompt(source, prompt or [], wholes, place, report)]
        return [example for example in made if example is not None]

    def _sequence(
        self, source: Source, prompt: list[int] | None, whole: list[int], place: str, report: Report
    ) -> Example | None:
        """One completion that begins at the first scored token."""
        text = whole_texts(source, self.encoder.tokenizer)[0]
        marked = self.assistant_only_loss or has_weights(text)
        mask = self.encoder.assistant_mask(text, source.options, place) if marked else None
        weights = token_weights(source.weight, text, mask, len(whole), place)
        start = 0
        if prompt is not None and self.completion_only_loss is not False:  # TRL's default, where there is one
            start = common_prefix(prompt, whole)
            report.moved += start < len(prompt)
        only = mask if self.assistant_only_loss else None
        scored = [index >= start and (only is None or only[index]) for index in range(len(whole))]
        if not any(scored):
            what = "no assistant's turn that the chat template marks" if only else "no tokens after its prompt"
            raise UserError(f"{place} has {what}: nothing in it can be learned")
        kept = whole[: self.max_length]
        # The first token of all has no predecessor to be predicted from, so it is never scored.
        first = next((index for index in range(1, len(kept)) if scored[index]), None)
        if first is None:
            report.dropped += 1
            return None
        report.truncated += len(kept) < len(whole)
        report.tokens_cut += len(whole) - len(kept)
        report.weighted += weights is not None
        rest, own = scored[first : len(kept)], weights and weights[first : len(kept)]
        return Example(kept[:first], [Completion(kept[first:], None if all(rest) else rest, own)], row=source.row)

    def _shared_prompt(
        self, source: Source, prompt: list[int], wholes: list[list[int]], place: str, report: Report
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
        if self.max_length is not None and start >= self.max_length:
            report.dropped += 1
            return None
        completions = [whole[start : self.max_length] for whole in wholes]
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
