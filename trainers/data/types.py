"""What rows become: a prompt with its completions, or a prompt to generate from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from logratio.losses import Support

from .tokenization import Text


@dataclass(frozen=True, slots=True)
class Completion:
    """Token ids that follow a prompt. scored: which of them the loss sees, same length; None: all of them.

    weights: what each of them weighs in the loss (SFT), same length; None: 1 each.
    behavior: the log-probability of each, in nats, in the distribution that it was sampled from (GRPO), same length.
    support: the words that each of them was sampled from (GRPO), same length; None: the whole vocabulary.
    """

    ids: list[int]
    scored: list[bool] | None = None
    weights: list[float] | None = None
    behavior: list[float] | None = None
    support: Support | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """What every method trains on: a prompt and its completions.

    prompt_ids: never empty, so that every scored token has a predecessor.
    completions: one (SFT, KTO), chosen and rejected (DPO, CPO, ORPO), these and gold (TPO), a list (listwise), or
        rollouts (GRPO). Of the data set's, none is without a scored token.
    label: True where the completion is desirable (KTO). advantages: one a completion (GRPO). rewards: one a completion
        (listwise).
    row: index in the data set, for messages.
    """

    prompt_ids: list[int]
    completions: list[Completion]
    label: bool | None = None
    row: int = -1
    advantages: tuple[float, ...] | None = None
    rewards: tuple[float, ...] | None = None

    def take(self, completions: Sequence[int]) -> Example:
        """The same prompt with some of its completions."""
        kept = [self.completions[i] for i in completions]
        advantages, rewards = (
            None if values is None else tuple(values[i] for i in completions)
            for values in (self.advantages, self.rewards)
        )
        return Example(self.prompt_ids, kept, self.label, self.row, advantages, rewards)


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
