"""What rows become: a prompt with its completions, or a prompt to generate from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from logratio.losses import Support

from .tokenization import Text


@dataclass(frozen=True, slots=True)
class Completion:
    """Token ids that follow a prompt. scored: which of them the loss sees, same length; None: all of them.

    weights: what each of them weighs in the loss (SFT; KTO, all alike), same length; None: 1 each.
    behavior: the log-probability of each, in nats, in the distribution that it was sampled from (GRPO), same length.
    support: the words that each of them was sampled from (GRPO), same length; None: the whole vocabulary.
    """

    ids: list[int]
    scored: list[bool] | None = None
    weights: list[float] | None = None
    behavior: list[float] | None = None
    support: Support | None = None

    @property
    def mask(self) -> list[bool]:
        """`scored`, written out."""
        return [True] * len(self.ids) if self.scored is None else self.scored

    @property
    def num_scored(self) -> int:
        return len(self.ids) if self.scored is None else sum(self.scored)


@dataclass(frozen=True, slots=True)
class Example:
    """What every method trains on: a prompt and its completions.

    prompt_ids: never empty, so that every scored token has a predecessor.
    completions: one (SFT, KTO), chosen and rejected (DPO, CPO, ORPO), these and gold (TPO), a list (listwise), or
        rollouts (GRPO). Of the data set's, none is without a scored token.
    label: True where the completion is desirable (KTO). advantages: one a completion (GRPO), or one for each of its
        scored tokens. margin: by how much chosen is better than rejected (DPO). rewards: one a completion (listwise).
    row: index in the data set, for messages.
    occurrence: which one it is of those that an optimizer step has of the row (GRPO), see `Prompt`.
    whole_tokens: scored tokens of the example that this one is a part of; None: it is whole.
    """

    prompt_ids: list[int]
    completions: list[Completion]
    label: bool | None = None
    row: int = -1
    advantages: tuple[float | tuple[float, ...], ...] | None = None
    whole_tokens: int | None = None
    margin: float | None = None
    rewards: tuple[float, ...] | None = None
    occurrence: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Scored tokens of all completions of the prompt, those of other parts of the example too."""
        return sum(c.num_scored for c in self.completions) if self.whole_tokens is None else self.whole_tokens

    def take(self, completions: Sequence[int]) -> Example:
        """The same prompt with some of its completions."""
        kept = [self.completions[i] for i in completions]
        advantages = None if self.advantages is None else tuple(self.advantages[i] for i in completions)
        rewards = None if self.rewards is None else tuple(self.rewards[i] for i in completions)
        return dataclasses.replace(
            self, completions=kept, advantages=advantages, whole_tokens=self.prompt_tokens, rewards=rewards
        )


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
