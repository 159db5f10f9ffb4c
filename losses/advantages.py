"""Advantages: what the reward R of a rollout is worth beside its group's, or beside all of the optimizer step's.

Everything is [groups, G] float64, one row a prompt; a group is complete, and the rows are those of the whole optimizer
step (see 2), of all processes. NaN is the reward of a completion that no reward function had an opinion on: it counts
for nothing, and its advantage is 0. Inside, an advantage that cannot be formed is NaN; `advantages_of` makes it 0.
m and std are mean and standard deviation (with Bessel's correction) of a group unless said otherwise, eps is 1e-4.

Differs from TRL 1.16:
1. Equal rewards give exactly 0, in float64; there, in float32, the rounding of their mean over eps.
2. Statistics "of the step" are of all rollouts that were sampled together, TRL's generation batch: those of an
   optimizer step, or with `steps_per_generation` of several. TRL's may also be of a part of one.
3. `reinforce_pp`, `reinforce_pp_baseline`, `remax` and `opo` are not in TRL, and whitening (`normalize_advantages`) is
   there in RLOO only, here for every type that is not whitened already.
4. Where fewer than two completions of a group have a reward, none of them has an advantage (as in TRL), and none enters
   the statistics of the whitening (as in TRL's RLOO).
Differs from the papers: REINFORCE++ whitens over tokens, so that long answers weigh more; here, as in TRL's recipe for
it, every completion weighs the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Variants, check_choice, variant

EPS = 1e-4
Dims = int | tuple[int, ...]
GROUP, STEP = 1, (0, 1)


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


def advantages_of(
    rewards: Tensor,
    advantage_type: str = "group",
    *,
    scale: str = "group",
    lengths: Tensor | None = None,
    baseline: Tensor | None = None,
    normalize_advantages: bool = False,
) -> Tensor:
    """The advantages [groups, G] of the step's rewards [groups, G], float64; 0 where there is no reward.

    lengths, baseline, scale: see `Context`. normalize_advantages: whiten them over the step.
    Raises ValueError for shapes and names that do not fit.
    """
    check_choice("advantage_type", advantage_type, ADVANTAGES)
    check_choice("scale", scale, SCALES)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [groups, G], got {list(rewards.shape)}")
    for name, given, shape in (("lengths", lengths, rewards.shape), ("baseline", baseline, (len(rewards), 1))):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for rewards {list(rewards.shape)}, got {list(given.shape)}")
    rewards = rewards.double()
    values = ADVANTAGES[advantage_type](rewards, Context(scale, lengths, baseline))
    return (normalize(values) if normalize_advantages else values).nan_to_num(0.0)


# Statistics of what is known ------------------------------------------------------------------------------------------


def _mean(values: Tensor, dim: Dims) -> Tensor:
    return values.nansum(dim, keepdim=True) / (~values.isnan()).sum(dim, keepdim=True)


def _std(values: Tensor, dim: Dims) -> Tensor:
    squares = (values - _mean(values, dim)).square().nansum(dim, keepdim=True)
    return (squares / ((~values.isnan()).sum(dim, keepdim=True) - 1)).sqrt()


def differ(values: Tensor, dim: Dims = GROUP) -> Tensor:
    """Whether those that are known along `dim`, which is kept, are not all equal."""
    highest = values.nan_to_num(-torch.inf).amax(dim, keepdim=True)
    return highest > values.nan_to_num(torch.inf).amin(dim, keepdim=True)


def _minus(values: Tensor, baseline: Tensor, dim: Dims) -> Tensor:
    """values - baseline: exactly 0 where all along `dim` are equal, NaN where fewer than two of them are known."""
    known = ~values.isnan()
    compared = known & (known.sum(dim, keepdim=True) > 1)
    return torch.where(compared, torch.where(differ(values, dim), values - baseline, 0.0), torch.nan)


def normalize(values: Tensor) -> Tensor:
    """(A - mean) / (std + eps) over the step: zero mean, unit variance. NaN stays NaN and does not count."""
    return _minus(values, _mean(values, STEP), STEP) / (_std(values, STEP) + EPS)


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "group": lambda rewards: _std(rewards, GROUP) + EPS,
    "batch": lambda rewards: _std(rewards, STEP) + EPS,
    "none": torch.ones_like,
}
"""scale_rewards -> what `group` divides by, given the step's rewards."""


# The formulas ---------------------------------------------------------------------------------------------------------


@advantage()
def group(rewards: Tensor, context: Context) -> Tensor:
    """A = (R - m) / (std + eps), GRPO (arXiv 2402.03300).

    scale "none": R - m, Dr. GRPO (arXiv 2503.20783). "batch": std is of all rewards of the step (arXiv 2508.08221),
    which holds the differences between prompts too.
    """
    return _minus(rewards, _mean(rewards, GROUP), GROUP) / SCALES[context.scale](rewards)


@advantage()
def rloo(rewards: Tensor, context: Context) -> Tensor:
    """A = R - mean of the others = G / (G - 1) (R - m), REINFORCE leave-one-out (arXiv 2402.14740)."""
    known = (~rewards.isnan()).sum(1, keepdim=True)
    others = (rewards.nansum(1, keepdim=True) - rewards) / (known - 1)
    return _minus(rewards, others, GROUP)


@advantage(smallest_group=1, whitened=True)
def reinforce_pp(rewards: Tensor, context: Context) -> Tensor:
    """A = (R - mean) / (std + eps) over all of the step, REINFORCE++ (arXiv 2501.03262)."""
    return normalize(rewards)


@advantage(whitened=True)
def reinforce_pp_baseline(rewards: Tensor, context: Context) -> Tensor:
    """R - m, whitened over the step: REINFORCE++-baseline (arXiv 2501.03262); std is of the centred rewards."""
    return normalize(_minus(rewards, _mean(rewards, GROUP), GROUP))


@advantage(smallest_group=1, wants_greedy=True)
def remax(rewards: Tensor, context: Context) -> Tensor:
    """A = R - R(greedy answer), ReMax (arXiv 2310.10505). 0 where there is no reward of the greedy answer."""
    if context.baseline is None:
        raise ValueError("remax compares with the reward of a greedy completion: give `baseline` [groups, 1]")
    return rewards - context.baseline


@advantage()
def opo(rewards: Tensor, context: Context) -> Tensor:
    """A = R - sum(|y| R) / sum(|y|), |y| a completion's tokens: the baseline of least variance (arXiv 2505.23585)."""
    if context.lengths is None:
        raise ValueError("opo weighs rewards by the completions' lengths: give `lengths` [groups, G]")
    lengths = context.lengths.double().masked_fill(rewards.isnan(), 0.0)
    return _minus(rewards, (lengths * rewards).nansum(1, keepdim=True) / lengths.sum(1, keepdim=True), GROUP)


# Several reward functions ---------------------------------------------------------------------------------------------

AGGREGATIONS: Variants[Callable[[Tensor, Tensor], Tensor]] = Variants()
"""multi_objective_aggregation -> R [groups, G] from the rewards [groups, G, K] of K functions, weights [K]."""


@variant(AGGREGATIONS)
def sum_then_normalize(by_function: Tensor, weights: Tensor) -> Tensor:
    """R = sum_k w_k R_k over the functions that have an opinion; NaN where none has."""
    known = ~by_function.isnan()
    return torch.where(known.any(-1), (by_function.nan_to_num(0.0) * weights).sum(-1), torch.nan)


@variant(AGGREGATIONS)
def normalize_then_sum(by_function: Tensor, weights: Tensor) -> Tensor:
    """R = sum_k w_k (R_k - m_k) / (std_k + eps), GDPO (arXiv 2601.05242), whose advantages are these, whitened over the
    step: those of `reinforce_pp`. With K = 1 that is not `group`: its advantages are divided by their std once more.

    As in TRL and unlike in the paper's code, a missing reward is left out, not read as 0.
    """
    normalized = _minus(by_function, _mean(by_function, GROUP), GROUP) / (_std(by_function, GROUP) + EPS)
    summed = (normalized.nan_to_num(0.0) * weights).sum(-1)
    return torch.where(by_function.isnan().all(-1), torch.nan, summed)
