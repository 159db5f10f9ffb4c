"""What a rollout function is given beside its prompts: how it asks the engine, in as many turns as it likes.

A turn's random numbers are those of the completion and of the turn's number, so that what is said depends on no other
completion, whichever of them are asked together.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from ...data.examples import Prompt
from ...errors import UserError, counted
from ..calling.asked import TrainerState
from ..engines.protocol import Request, Sample, Sampling, Say
from ..generation import turn_seed


class Turns:
    """Of one call of the function, on this process.

    processing_class: the tokenizer. prompt_ids: of each prompt that the function is given, one for each completion.
    columns: of the data set, each a list as long. num_generations: as often each prompt stands in a row.
    max_completion_length: tokens of a completion, whoever writes them. state: global_step, max_steps and epoch.
    sampling: how tokens are drawn. words: rows of the embeddings, which token ids are below.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int | None],
        say: Say,
        sampling: Sampling,
        *,
        processing_class: Any,
        num_generations: int,
        state: TrainerState,
        words: int,
    ) -> None:
        self._prompts, self._seeds, self._say = prompts, seeds, say
        self.sampling, self.words = sampling, words
        self.processing_class, self.num_generations, self.state = processing_class, num_generations, state
        self.prompt_ids = [list(prompt.prompt_ids) for prompt in prompts]
        self.columns = {key: [p.columns[key] for p in prompts] for key in prompts[0].columns}
        self.max_completion_length = sampling.max_new_tokens
        self.heard: list[list[tuple[list[int], Sample]]] = [[] for _ in prompts]
        """Of each completion the turns so far: what the model went on from, and with."""

    def sample(
        self,
        ids: Iterable[Sequence[int]],
        which: Iterable[int] | None = None,
        *,
        max_new_tokens: int | None = None,
        stop_strings: Sequence[str] = (),
    ) -> list[Sample]:
        """What the model goes on with behind each of these token ids: `ids`, `logps`, `finish_reason`.

        ids: the prompt and all that was said since. which: of which prompts these are, by their places; None: of all.
        max_new_tokens, stop_strings: what ends a turn beside the run's own ends. Where nothing is left of
        max_completion_length, nothing is said, with the finish_reason "length". What is said depends on the
        completion's seed, on how often it was asked before, and on `ids`.
        """
        contexts = [[checked_id(token, self.words) for token in one] for one in ids]
        places = list(range(len(self._prompts))) if which is None else [operator.index(i) for i in which]
        self._check(contexts, places)
        asked: dict[tuple[tuple[int, ...], int], list[int]] = {}
        said = [Sample([], "length", []) for _ in places]
        for at, (i, context) in enumerate(zip(places, contexts, strict=True)):
            began = len(self.heard[i][0][0]) if self.heard[i] else len(context)
            left = self.max_completion_length - (len(context) - began)
            room = left if max_new_tokens is None else min(left, max_new_tokens)
            if room > 0:
                asked.setdefault((tuple(context), room), []).append(at)
        requests = [
            Request(
                list(context), [turn_seed(self._seeds[places[at]], len(self.heard[places[at]])) for at in own], room
            )
            for (context, room), own in asked.items()
        ]
        sampling = self.sampling
        sampling = dataclasses.replace(sampling, stop_strings=(*sampling.stop_strings, *stop_strings))
        for own, samples in zip(asked.values(), self._say(requests, sampling), strict=True):
            for at, sample in zip(own, samples, strict=True):
                said[at] = sample
                self.heard[places[at]].append((contexts[at], sample))
        return said

    def _check(self, contexts: Sequence[Sequence[int]], places: Sequence[int]) -> None:
        if len(contexts) != len(places):
            raise UserError(f"sample() got {counted(len(contexts), 'list')} of ids for {len(places)} places in `which`")
        if len(set(places)) < len(places) or not set(places) <= set(range(len(self._prompts))):
            raise UserError(
                f"sample(which={places}) must name places of the {counted(len(self._prompts), 'prompt')}, each once"
            )
        if empty := [i for i, context in zip(places, contexts, strict=True) if not context]:
            raise UserError(f"sample() got no token for the prompt at place {empty[0]}: hand on the prompt's at least")


def checked_id(token: Any, words: int) -> int:
    """A token id as a number. UserError where it is none, or has no row in the embeddings."""
    try:
        number = operator.index(token)
    except TypeError:
        raise UserError(f"a token id must be a whole number, got {token!r}") from None
    if not 0 <= number < words or isinstance(token, bool):
        raise UserError(f"{token!r} is no token of the model, whose ids end at {words - 1}")
    return number
