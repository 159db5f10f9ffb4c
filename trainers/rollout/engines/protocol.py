"""What is asked of an engine, and what it answers. Rewards, advantages and losses do not know which one ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from logratio.losses import Support

from ...data.examples import Prompt
from ...ground.finite import is_finite
from .background import Begun

FinishReason = Literal["stop", "length"]
ROUNDING = 1e-3
"""Nats by which the log-probability of a certain token may be above 0."""


def is_logp(value: Any) -> bool:
    """A finite number, not above 0."""
    return is_finite(value) and value <= ROUNDING


@dataclass(frozen=True)
class Request:
    """A prompt, and the seed of each completion that is wanted of it; None: a greedy one. room: tokens that these may
    have, where it is fewer than `Sampling.max_new_tokens`."""

    prompt_ids: Sequence[int]
    seeds: Sequence[int | None]
    room: int | None = None

    def limit(self, sampling: Sampling) -> int:
        """Tokens of each completion at most."""
        return sampling.max_new_tokens if self.room is None else min(self.room, sampling.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn, and where they end.

    temperature divides the logits. Of what is left of the tokens, these are kept, one after the other: the `top_k`
    likeliest (0: all), the smallest set of at least the probability `top_p`, and those of at least `min_p` times the
    likeliest one's. repetition_penalty: of transformers, on the raw logits of what prompt and completion hold already.
    stop_ids: any of them ends a completion, and is its last token. stop_strings: any text of a completion that holds
    one ends it, with the token that completes it. keep_support: samples say which tokens could have been drawn.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    keep_support: bool = False

    @property
    def cut(self) -> bool:
        """Whether some tokens cannot be drawn, so that the others' probabilities are larger than the model's."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def reshapes(self) -> bool:
        """Whether tokens are drawn from another distribution than the model's own."""
        return self.cut or self.temperature != 1 or self.repetition_penalty != 1


@dataclass(frozen=True)
class Sample:
    """A completion. ids: its tokens, with the one that ended it. logps: the log-probability of each, in nats, in the
    distribution that it was drawn from; of a greedy one that of the model at the temperature. version: of the policy
    that said it. support: of each token, what could have been drawn, where that was asked for and is not everything.
    Of a rollout function: written, which tokens the model wrote, where others stand between them, whose logps say
    nothing (None: all); told: the prompt, with what the function said of the completion among its columns.
    """

    ids: list[int]
    finish_reason: FinishReason
    logps: list[float]
    version: int = 0
    support: Support | None = field(default=None, compare=False)
    written: list[bool] | None = None
    told: Prompt | None = field(default=None, compare=False)

    @property
    def ended(self) -> bool:
        """False where max_new_tokens cut it."""
        return self.finish_reason == "stop"

    @property
    def own_logps(self) -> list[float]:
        """Of the tokens that the model wrote."""
        return self.logps if self.written is None else list(compress(self.logps, self.written))

    def first(self, tokens: int) -> Sample:
        """The same, had it been cut behind so many tokens."""
        if len(self.ids) <= tokens:
            return self
        support = None if self.support is None else self.support.take(torch.arange(tokens))
        return Sample(self.ids[:tokens], "length", self.logps[:tokens], self.version, support)


Said = list[list[Sample]]
"""Of each request its samples, one a seed."""
Say = Callable[[Sequence[Request], Sampling], Said]


class Engine(Protocol):
    """Samples completions of the policy as it was when `sync` was last called.

    name: what the log calls it. rows: completions under way at a time, memory and speed. sample() answers in the order
    of the requests and of their seeds. A completion depends on its prompt, the policy, the options and its seed alone.
    """

    rows: int

    @property
    def name(self) -> str: ...

    def sync(self, version: int) -> None:
        """The policy has changed, and is called `version` from now on."""

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> Said:
        """Called on all processes, each with requests of its own."""
        said: Said = []
        with self.rounds() as say:
            said = say(requests, sampling)
        return said

    def rounds(self) -> AbstractContextManager[Say]:
        """Inside, each process may ask as often as it likes; entered and left by all together."""

    def close(self) -> None:
        """Give back what it holds; nothing is sampled afterwards."""


@runtime_checkable
class Background(Protocol):
    """An engine that samples elsewhere, while the policy goes on learning."""

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> Begun[Said]:
        """As `sample`, of the policy as it is now, in the background. What it raises, this process alone raises."""
