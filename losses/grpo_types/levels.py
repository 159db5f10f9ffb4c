"""What the importance ratio is of, and the estimators of the KL term."""

from __future__ import annotations

import torch
from torch import Tensor

from ..divergences import MAX_EXPONENT
from ..options import variant
from .base import KL_ESTIMATORS, LEVELS


@variant(LEVELS)
def token(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """[C, T], a ratio for each token."""
    return log_ratio


@variant(LEVELS)
def sequence(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """[C, 1], log s_i: one for the completion, the exp of the mean (GSPO, arXiv 2507.18071 Eq. 7)."""
    return log_ratio.sum(-1, keepdim=True) / lengths


@variant(LEVELS)
def sequence_token(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """[C, T], log of sg[s_i] p / sg[p]: the value s_i, the gradient of each token's own (GSPO-token, Eq. 14)."""
    return sequence(log_ratio, lengths).detach() + (log_ratio - log_ratio.detach())


@variant(KL_ESTIMATORS)
def k1(d: Tensor) -> Tensor:
    """d: unbiased, and as a loss its gradient has mean 0 on policy; for use in rewards."""
    return d


@variant(KL_ESTIMATORS)
def k2(d: Tensor) -> Tensor:
    """d^2 / 2: biased, but its gradient is that of KL(policy || reference) on policy."""
    return d**2 / 2


@variant(KL_ESTIMATORS)
def k3(d: Tensor) -> Tensor:
    """exp(-d) + d - 1 >= 0: unbiased; its plain gradient is that of the forward KL. In this form exact at small d."""
    return torch.expm1((-d).clamp(max=MAX_EXPONENT)) + d


@variant(KL_ESTIMATORS, "k3+")
def k3_plus(d: Tensor) -> Tensor:
    """The value of k3, the gradient of k2: unbiased, and on policy its gradient is that of KL(policy || reference)."""
    straight = k2(d)
    return straight + (k3(d) - straight).detach()


@variant(KL_ESTIMATORS, "abs")
def absolute(d: Tensor) -> Tensor:
    """|d|: biased; of slope 0 where policy and reference agree."""
    return d.abs()
