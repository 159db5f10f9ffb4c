"""From the rewards of several functions to one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..options import Variants, variant
from .statistics import EPS, GROUP, mean_of, minus, std_of

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
    normalized = minus(by_function, mean_of(by_function, GROUP), GROUP) / (std_of(by_function, GROUP) + EPS)
    summed = (normalized.nan_to_num(0.0) * weights).sum(-1)
    return torch.where(by_function.isnan().all(-1), torch.nan, summed)
