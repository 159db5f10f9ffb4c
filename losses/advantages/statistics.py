"""Statistics of the rewards that are known: along the groups, or over the step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-4
Dims = int | tuple[int, ...]
GROUP, STEP = 1, (0, 1)


def mean_of(values: Tensor, dim: Dims) -> Tensor:
    """Of those that are known along `dim`, which is kept; NaN where none is."""
    return values.nansum(dim, keepdim=True) / (~values.isnan()).sum(dim, keepdim=True)


def std_of(values: Tensor, dim: Dims) -> Tensor:
    """Of those that are known along `dim`, with Bessel's correction."""
    squares = (values - mean_of(values, dim)).square().nansum(dim, keepdim=True)
    return (squares / ((~values.isnan()).sum(dim, keepdim=True) - 1)).sqrt()


def differ(values: Tensor, dim: Dims = GROUP) -> Tensor:
    """Whether those that are known along `dim`, which is kept, are not all equal."""
    highest = values.nan_to_num(-torch.inf).amax(dim, keepdim=True)
    return highest > values.nan_to_num(torch.inf).amin(dim, keepdim=True)


def minus(values: Tensor, baseline: Tensor, dim: Dims) -> Tensor:
    """values - baseline: exactly 0 where all along `dim` are equal, NaN where fewer than two of them are known."""
    known = ~values.isnan()
    compared = known & (known.sum(dim, keepdim=True) > 1)
    return torch.where(compared, torch.where(differ(values, dim), values - baseline, 0.0), torch.nan)


def normalize(values: Tensor) -> Tensor:
    """(A - mean) / (std + eps) over the step: zero mean, unit variance. NaN stays NaN and does not count."""
    step = tuple(range(values.ndim))
    return minus(values, mean_of(values, step), step) / (std_of(values, step) + EPS)


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "group": lambda rewards: std_of(rewards, GROUP) + EPS,
    "batch": lambda rewards: std_of(rewards, STEP) + EPS,
    "none": torch.ones_like,
}
"""scale_rewards -> what `group` divides by, given the step's rewards."""
