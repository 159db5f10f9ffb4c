"""Surrogates that weigh log p itself by a number without a gradient: every token keeps one.

rho, A and the rest are those of `grpo.py`; all values are to be minimised.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..types import choose
from .base import GRPO_TYPES, GRPOType, Ratios
from .weights import sequence_sum, token_mean

if TYPE_CHECKING:
    from ..grpo import GRPOLoss


def log_prob(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-A log p, REINFORCE, whatever the policy is that sampled; GPG's loss (arXiv 2504.02546)."""
    return -x.advantages * x.logps


def capped_weight(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-sg(min(rho, epsilon_high)) A log p, CISPO, arXiv 2506.13585: every token keeps a gradient.

    With an epsilon the weight is at least 1 - epsilon, the lower bound that the paper has and does not use.
    """
    _, low, high = capped_range(x, loss)
    return -x.ratio.clamp(low, high).detach() * x.advantages * x.logps


def capped_range(x: Ratios, loss: GRPOLoss) -> tuple[Tensor, float, float]:
    """rho [C, T] or [C, 1], and the range in which CISPO does not cap it: by default it has no lower bound."""
    return x.ratio, -math.inf if loss.epsilon is None else 1 - loss.epsilon, loss.epsilons[1]


def gamma_weight(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-sg(phi(W)) A log p, phi(W) = exp(lam + k log W - lam W), W = exp(sum log rho), VESPO, arXiv 2602.10693 Sec. 3.4.

    phi(1) = 1. Log-ratios stop at +-20 a token and at [log 1e-8, 20] a sequence, as in the authors' code and TRL. A
    sampling correction's weights are factors of W, as in TRL, each from 1e-8 to exp(20).
    """
    positive = x.advantages >= 0
    k = choose(positive, loss.vespo_k_pos, loss.vespo_k_neg, x.ratio)
    lam = choose(positive, loss.vespo_lambda_pos, loss.vespo_lambda_neg, x.ratio)
    log_w = x.log_ratio.detach().clamp(-20, 20).sum(-1, keepdim=True)
    if x.weight is not None:
        log_w = log_w + x.weight.log().clamp(math.log(1e-8), 20).sum(-1, keepdim=True)
    log_w = log_w.clamp(math.log(1e-8), 20)
    return -(lam + k * log_w - lam * log_w.exp()).exp() * x.advantages * x.logps


def tapered(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-w A log p, w = 1 where A >= 0 and sg(min(W, 1)) elsewhere, W = exp(sum log rho), TOPR, arXiv 2503.14286.

    Readings: (1) the paper's reward less its baseline is A; (2) its policy that sampled is `old`, as for every ratio
    here: for what another engine sampled take a sampling correction of sequences beside; (3) W is the whole answer's,
    as there, where verl's topr takes its geometric mean.
    """
    w = x.log_ratio.detach().sum(-1, keepdim=True).clamp(max=0).exp()
    return -torch.where(x.advantages >= 0, 1.0, w) * x.advantages * x.logps


def mirror_descent(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-A log p + (tau / 2) (sum log rho)^2 / |y|, Kimi k1.5, arXiv 2501.12599 Sec. 2.3.2: of a completion
    -A log p(y) + (tau / 2) log^2(p(y) / p_old(y)), of gradient Eq. 3.

    There A is R less its group's mean, without a std. Reading: tau is `log_ratio_coef`, of which the paper gives no
    number.
    """
    drift = x.log_ratio.sum(-1, keepdim=True)
    return -x.advantages * x.logps + loss.log_ratio_coef / 2 * drift**2 / x.lengths


NO_RATIO = ("importance_sampling_level",)

GRPO_TYPES.enter(
    "cispo",
    GRPOType(capped_weight, token_mean, epsilon_high=5.0, clip=capped_range),
    reads=("epsilon", "epsilon_high"),
)
GRPO_TYPES.enter(
    "vespo",
    GRPOType(gamma_weight, token_mean, corrected=("token",), weighs=True, of_tokens=False),
    reads=("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    ignores=NO_RATIO,
)
GRPO_TYPES.enter("reinforce", GRPOType(log_prob, token_mean), ignores=NO_RATIO)
GRPO_TYPES.enter("topr", GRPOType(tapered, sequence_sum, of_tokens=False), ignores=NO_RATIO)
GRPO_TYPES.enter(
    "kimi", GRPOType(mirror_descent, sequence_sum, of_tokens=False), reads=("log_ratio_coef",), ignores=NO_RATIO
)
