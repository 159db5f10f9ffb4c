"""Groups of tokens laid into rows, as tensors: where every token lies, and what predicts each one that is scored.

What is laid is noted a stretch at a time, and written out for all tokens at once: a step holds hundreds of stretches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from logratio.losses import Support

from ..data.examples import Completion, Example


class _Stretch(NamedTuple):
    """A prompt or a completion. place: of its first token in the flattened rows; position: in its sequence."""

    place: int
    length: int
    position: int
    group: int
    segment: int


class _Run(NamedTuple):
    """Tokens that are predicted one by another. first: which of all tokens, in the order in which they were laid.
    before: the place that predicts the first one. path, step: where it goes in the result. masked: only the scored
    ones of a completion, with their weights."""

    first: int
    length: int
    before: int
    path: int
    step: int
    masked: bool


class Layout:
    """R rows of L tokens, to lay groups into."""

    def __init__(self, rows: int, length: int) -> None:
        self.shape = (rows, length)
        self._tokens: list[Sequence[int]] = []
        self._stretches: list[_Stretch] = []
        self._runs: list[_Run] = []
        self._masks: list[tuple[int, Completion]] = []
        self._count = 0

    def lay(
        self, example: Example, completions: Sequence[int], place: int, group: int, path: int, prompt_path: int | None
    ) -> int:
        """A prompt and these of its completions, from `place` on; returns where they end.

        path: of completion 0, which the others follow. prompt_path: of the prompt, where it is scored, once: with
        completion 0.
        """
        prompt, inside = self._count, len(example.prompt_ids)
        self._add(example.prompt_ids, _Stretch(place, inside, 0, group, 0))
        end = place + inside
        for k in completions:
            completion, first = example.completions[k], self._count
            length = len(completion.ids)
            self._add(completion.ids, _Stretch(end, length, inside, group, k + 1))
            self._masks.append((first, completion))
            self._runs.append(_Run(first, length, place + inside - 1, path + k, 0, True))
            if k == 0 and prompt_path is not None:
                self._runs.append(_Run(prompt + 1, inside - 1, place, prompt_path, 0, False))
                # the end of a prompt that its completions tokenize differently counts as prompt
                unscored = [i for i, scored in enumerate(completion.scored or ()) if not scored]
                for step, i in enumerate(unscored, start=inside - 1):  # completion 0 lies right behind its prompt
                    self._runs.append(_Run(first + i, 1, end + i - 1, prompt_path, step, False))
            end += length
        return end

    def _add(self, tokens: Sequence[int], stretch: _Stretch) -> None:
        self._tokens.append(tokens)
        self._stretches.append(stretch)
        self._count += len(tokens)

    def rows(self, pad_id: int, plain: bool) -> dict[str, Tensor]:
        """`input_ids`, `position_ids`, `group` and `segment` of a `PackedBatch`."""
        place, lengths, position, group, segment = np.array(self._stretches, np.int64).T
        within = _count_up(lengths)
        self._ids = np.fromiter(itertools.chain.from_iterable(self._tokens), np.int64, self._count)
        self._places = np.repeat(place, lengths) + within

        def filled(value: int, tokens: np.ndarray) -> Tensor:
            rows = np.full(self.shape, value, np.int64)
            rows.reshape(-1)[self._places] = tokens
            return torch.from_numpy(rows)

        # Without a mask a position that starts again would begin a new document. With one, a row may be longer than any
        # of its sequences, and positions beyond these may have no embedding.
        positions = filled(0, np.repeat(position, lengths) + within)
        if plain:
            positions = torch.arange(self.shape[1]).repeat(self.shape[0], 1)
        return {
            "input_ids": filled(pad_id, self._ids),
            "position_ids": positions,
            "group": filled(-1, np.repeat(group, lengths)),
            "segment": filled(0, np.repeat(segment, lengths)),
        }

    def scored(self, paths: int) -> dict[str, Tensor | Support | None]:
        """`hidden_index`, `targets`, `slot`, `scored`, `weights`, `support` of a `PackedBatch`, after `rows`."""
        first, lengths, before, path, step, masked = np.array(self._runs, np.int64).T
        within = _count_up(lengths)
        token = np.repeat(first, lengths) + within
        hidden = self._places[token] - 1
        hidden[within == 0] = before[lengths > 0]
        counts, weight = np.ones(self._count, bool), np.ones(self._count, np.float32)
        weighted = False
        for at, completion in self._masks:
            if completion.scored is not None:
                counts[at : at + len(completion.ids)] = completion.scored
            if completion.weights is not None:
                weight[at : at + len(completion.ids)] = completion.weights
                weighted = True
        of_completion = np.repeat(masked > 0, lengths)
        kept = counts[token] | ~of_completion
        steps = (np.repeat(step, lengths) + within)[kept]
        width = int(steps.max()) + 1 if len(steps) else 1
        slot = np.repeat(path, lengths)[kept] * width + steps
        scored, weights = np.zeros(paths * width, bool), np.zeros(paths * width, np.float32)
        scored[slot] = True
        weights[slot] = np.where(of_completion, weight[token], 1)[kept]
        return {
            "hidden_index": torch.from_numpy(hidden[kept]),
            "targets": torch.from_numpy(self._ids[token[kept]]),
            "slot": torch.from_numpy(slot),
            "scored": torch.from_numpy(scored.reshape(-1, width)),
            "weights": torch.from_numpy(weights.reshape(-1, width)) if weighted else None,
            "support": self._support(token[kept]),
        }

    def _support(self, tokens: np.ndarray) -> Support | None:
        """Of these tokens; those of prompts, and of completions that say nothing, have the whole vocabulary."""
        parts, end = [], 0
        for first, completion in self._masks:
            if completion.support is not None:
                parts += [Support.whole(first - end), completion.support]
                end = first + len(completion.ids)
        if not parts:
            return None
        return Support.cat([*parts, Support.whole(self._count - end)]).take(torch.from_numpy(tokens))


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... length - 1 of each, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
