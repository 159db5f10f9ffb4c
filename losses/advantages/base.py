"""What an advantage is: a formula, what it asks of the rollouts, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..options import Variants


class Context(NamedTuple):
    """What some advantages need beside the rewards.

    scale: of `group`: divide by the standard deviation of the group, of the step's rewards ("batch"), or not ("none").
    lengths: [groups, G], tokens of each completion. baseline: [groups, 1], reward of the greedy completion.
    """

    scale: str = "group"
    lengths: Tensor | None = None
    baseline: Tensor | None = None


Formula = Callable[[Tensor, Context], Tensor]


@dataclass(frozen=True)
class Advantage:
    """A formula, and what it asks of the rollouts.

    smallest_group: completions of a prompt that it needs. whitened: its values are whitened over the step already.
    wants_greedy: it needs `Context.baseline`, the reward of a greedy completion of each prompt.
    """

    formula: Formula
    smallest_group: int
    whitened: bool
    wants_greedy: bool

    def __call__(self, rewards: Tensor, context: Context) -> Tensor:
        """R [groups, G] float64 -> A [groups, G], NaN where there is none."""
        return self.formula(rewards, context)


ADVANTAGES: Variants[Advantage] = Variants()
"""Every advantage_type by its name."""


def advantage(
    smallest_group: int = 2, whitened: bool = False, wants_greedy: bool = False
) -> Callable[[Formula], Formula]:
    """Function decorator: enter a formula into `ADVANTAGES` under its own name."""

    def add(formula: Formula) -> Formula:
        ADVANTAGES.enter(formula.__name__, Advantage(formula, smallest_group, whitened, wants_greedy))
        return formula

    return add
