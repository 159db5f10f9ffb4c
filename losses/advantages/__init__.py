"""Advantages: what the reward R of a rollout is worth beside its group's, or beside all of the optimizer step's.

Everything is [groups, G] float64, one row a prompt; a group is complete, and the rows are those of the whole optimizer
step (see 2), of all processes. NaN is the reward of a completion that no reward function had an opinion on: it counts
for nothing, and its advantage is 0. Inside, an advantage that cannot be formed is NaN; `advantages_of` makes it 0.
m and std are mean and standard deviation (with Bessel's correction) of a group unless said otherwise, eps is 1e-4.

Differs from TRL 1.16:
1. Equal rewards give exactly 0, in float64; there, in float32, the rounding of their mean over eps.
2. Statistics "of the step" are of all rollouts that were sampled together, TRL's generation batch: those of an
   optimizer step, or with `steps_per_generation` of several. TRL's may also be of a part of one.
3. Of the types TRL has `group` and `rloo`, and no sum of several; whitening (`normalize_advantages`) is there in RLOO
   only, here for every type that is not whitened already.
4. Where fewer than two completions of a group have a reward, none of them has an advantage (as in TRL), and none enters
   the statistics of the whitening (as in TRL's RLOO).
Differs from the papers: REINFORCE++ whitens over tokens, so that long answers weigh more: `reinforce_pp_tokens`; in
`reinforce_pp`, as in TRL's recipe for it, every completion weighs the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..options import check_choice
from . import formulas  # they fill the table
from .base import ADVANTAGES, Advantage, Context, advantage
from .several import AGGREGATIONS, normalize_then_sum, sum_then_normalize
from .statistics import SCALES, differ, normalize

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "SCALES",
    "Advantage",
    "Context",
    "advantage",
    "advantages_of",
    "differ",
    "formulas",
    "normalize",
    "normalize_then_sum",
    "sum_then_normalize",
]


def advantages_of(
    rewards: Tensor,
    advantage_type: str | Advantage | Sequence[str | Advantage] = "group",
    *,
    weights: Sequence[float] | None = None,
    scale: str = "group",
    lengths: Tensor | None = None,
    baseline: Tensor | None = None,
    normalize_advantages: bool = False,
) -> Tensor:
    """The advantages [groups, G] of the step's rewards [groups, G], float64; 0 where there is no reward.

    advantage_type: a name, a formula of one's own as an `Advantage`, or several of these: the sum of weights[k] A_k
    (default: 1 each). [groups, G, T] where a formula of one's own gives every token its own, of which NaN are 0 too.
    lengths, baseline, scale: see `Context`. normalize_advantages: whiten the sum over the step.
    Raises ValueError for shapes and names that do not fit.
    """
    several = [advantage_type] if isinstance(advantage_type, str | Advantage) else list(advantage_type)
    for one in several:
        if isinstance(one, str):
            check_choice("advantage_type", one, ADVANTAGES)
    check_choice("scale", scale, SCALES)
    weights = [1.0] * len(several) if weights is None else weights
    if len(weights) != len(several):
        raise ValueError(f"{len(weights)} weights for {len(several)} advantage types")
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [groups, G], got {list(rewards.shape)}")
    for name, given, shape in (("lengths", lengths, rewards.shape), ("baseline", baseline, (len(rewards), 1))):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for rewards {list(rewards.shape)}, got {list(given.shape)}")
    rewards, context = rewards.double(), Context(scale, lengths, baseline)
    parts = [ADVANTAGES[one] if isinstance(one, str) else one for one in several]
    values = [_checked(part(rewards, context), rewards, part) for part in parts]
    if len(values) == 1 and weights[0] == 1:
        return (normalize(values[0]) if normalize_advantages else values[0]).nan_to_num(0.0)
    return _mixed(values, weights, normalize_advantages)


def _checked(values: Tensor, rewards: Tensor, part: Advantage) -> Tensor:
    """ValueError for what no advantages can be, which is a fault of a formula of one's own."""
    name = getattr(part.formula, "__name__", "the advantage")
    if not isinstance(values, Tensor) or values.ndim not in (2, 3) or values.shape[:2] != rewards.shape:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name} must return {list(rewards.shape)}, or that with one a token behind it, got {got}")
    if values.isinf().any():
        raise ValueError(f"{name} returned an infinite advantage")
    return values.detach().double()


def _mixed(values: Sequence[Tensor], weights: Sequence[float], whiten: bool) -> Tensor:
    """sum_k w_k A_k; what has no advantage of any type does not count in the whitening. Tokens add to completions."""
    width = max(x.shape[2] if x.ndim == 3 else 0 for x in values)
    values = [x if x.ndim == 3 or not width else x[..., None].expand(*x.shape, width) for x in values]
    mixed = sum(w * x.nan_to_num(0.0) for w, x in zip(weights, values, strict=True))
    assert isinstance(mixed, Tensor)
    if whiten:
        mixed = normalize(mixed.masked_fill(torch.stack([x.isnan() for x in values]).all(0), torch.nan))
    return mixed.nan_to_num(0.0)
