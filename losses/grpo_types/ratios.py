"""Surrogates of the importance ratio, and the variants of the first papers: what TRL has too.

rho, A and the rest are those of `grpo.py`; all values are to be minimised.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..divergences import MAX_EXPONENT
from .base import GRPO_TYPES, GRPOType, Ratios
from .weights import constant_length, sequence_mean, sequence_sum, token_mean

if TYPE_CHECKING:
    from ..grpo import GRPOLoss


def clipped(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-min(min(rho, delta) A, clip(rho) A), arXiv 2402.03300 Eq. 3 (PPO, 1707.06347 Eq. 7), delta: 2505.07291."""
    ratio, low, high = ratio_range(x, loss)
    capped = ratio.clamp(max=math.inf if loss.delta is None else loss.delta)
    return -torch.min(capped * x.advantages, ratio.clamp(low, high) * x.advantages)


def ratio_range(x: Ratios, loss: GRPOLoss) -> tuple[Tensor, float, float]:
    """rho [C, T] or [C, 1], and the range in which it is not clipped."""
    low, high = loss.epsilons
    return x.ratio, 1 - low, 1 + high


def clipped_sequence(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-min(W A, clip(W) A), W = exp(sum log rho), RLOO, arXiv 2402.14740, clipped as TRL does (the paper does not)."""
    ratio, low, high = sequence_ratio_range(x, loss)
    return -torch.min(ratio * x.advantages, ratio.clamp(low, high) * x.advantages)


def sequence_ratio_range(x: Ratios, loss: GRPOLoss) -> tuple[Tensor, float, float]:
    """W [C, 1], and the range in which it is not clipped."""
    low, high = loss.epsilons
    return x.log_ratio.sum(-1, keepdim=True).clamp(max=MAX_EXPONENT).exp(), 1 - low, 1 + high


def geometric_mean(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-A exp(mean_t h), h = min(log rho, clip) for A > 0 and max(log rho, clip) else, GMPO, arXiv 2507.20673.

    clip: log rho held in [-epsilon, epsilon_high].
    """
    bounded = x.log_ratio.clamp(*log_ratio_range(x, loss)[1:])
    h = torch.where(x.advantages > 0, torch.min(x.log_ratio, bounded), torch.max(x.log_ratio, bounded))
    mean = torch.where(x.kept, h, 0.0).sum(-1, keepdim=True) / x.kept.sum(-1, keepdim=True).clamp(min=1)
    return -mean.clamp(max=MAX_EXPONENT).exp() * x.advantages


def log_ratio_range(x: Ratios, loss: GRPOLoss) -> tuple[Tensor, float, float]:
    """log rho [C, T], and the range in which GMPO does not clip it."""
    low, high = loss.epsilons
    return x.log_ratio, -low, high


CLIP = ("epsilon", "epsilon_high")
OF_SEQUENCES = ("sequence", "geometric")
WHOLE = ("importance_sampling_level", "loss_aggregation", "use_bias_correction_kl")

for _name, _weight in {
    "dapo": token_mean,
    "grpo": sequence_mean,
    "dr_grpo": constant_length,
    "bnpo": token_mean,
    "luspo": sequence_sum,
}.items():
    GRPO_TYPES.enter(_name, GRPOType(clipped, _weight, clip=ratio_range), reads=(*CLIP, "delta"))
GRPO_TYPES.enter(
    "gmpo",
    GRPOType(
        geometric_mean,
        sequence_mean,
        sequence_term=True,
        epsilon=0.4,
        widest=math.inf,
        clip=log_ratio_range,
        corrected=OF_SEQUENCES,
        of_tokens=False,
    ),
    reads=CLIP,
    ignores=WHOLE,
)
GRPO_TYPES.enter(
    "rloo",
    GRPOType(clipped_sequence, sequence_mean, clip=sequence_ratio_range, corrected=OF_SEQUENCES, of_tokens=False),
    reads=CLIP,
    ignores=(*WHOLE, "beta", "kl_estimator", "top_entropy_quantile"),  # its KL is in the reward: `reward_kl_coef`
)
