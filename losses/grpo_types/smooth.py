"""Surrogates without a clip: what holds the ratio near 1 is a penalty, a gate or a mixture; and FIPO's weights.

rho, A and the rest are those of `grpo.py`; all values are to be minimised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..types import choose
from .base import GRPO_TYPES, GRPOType, Ratios
from .ratios import CLIP, WHOLE, clipped, ratio_range
from .weights import sequence_mean, token_mean

if TYPE_CHECKING:
    from ..grpo import GRPOLoss


HIGHEST = 4.85e8
"""About exp(20)."""


def soft_gate(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-(4 / tau) sigmoid(tau (rho - 1)) A, tau by the sign of A, SAPO, arXiv 2511.20347; slope -A at rho = 1."""
    tau = choose(x.advantages > 0, loss.sapo_temperature_pos, loss.sapo_temperature_neg, x.ratio)
    return -(tau * (x.ratio - 1)).sigmoid() * 4 / tau * x.advantages


def quadratic(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-(rho A - |A| / (2 epsilon) (rho - 1)^2), CFPO, arXiv 2601.22801 Eq. 7: no slope at rho = 1 + epsilon sign(A).

    Reading: the ratio stops at exp(20) here, since it is squared; beyond, it has no gradient.
    """
    ratio, (width, _) = x.ratio.clamp(max=HIGHEST), loss.epsilons
    return -ratio * x.advantages + x.advantages.abs() / (2 * width) * (ratio - 1) ** 2


def smoothed(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-((1 - alpha) rho + alpha) A: the ratio of the policy mixed with the old one, PSPO, arXiv 2509.21282."""
    return -((1 - loss.pspo_alpha) * x.ratio + loss.pspo_alpha) * x.advantages


def penalized(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-weight rho A + tau (log p - log mu)^2, prime-rl's default, with the mask |p - mu| of sampling_correction ipo (or
    dppo_tv) as weight; tau is `log_ratio_coef`, its `kl_tau`, 1e-3 there too.

    Readings: (1) mu is what sampled, or `old` where nobody says; (2) the mask does not touch the penalty. There
    advantages are not divided by a std.
    """
    penalty = loss.log_ratio_coef * x.from_sampler**2
    return -x.ratio * x.advantages * (1.0 if x.weight is None else x.weight) + penalty


def regressed(x: Ratios, loss: GRPOLoss) -> Tensor:
    """(beta_2 log(p(y) / p_ref(y)) - A)^2 of a completion, A*-PO, arXiv 2505.20686, beta_2 `a2po_beta`, as TRL has it.

    Reading: there A = R - V*, with V* = beta_1 log mean exp(R / beta_1) over answers of the reference, drawn before
    training. What A is, is for the advantage to say: R less a column of such numbers, or less that of the group itself.
    """
    assert x.ref_logps is not None
    reward = loss.a2po_beta * (x.logps - x.ref_logps).sum(-1, keepdim=True)
    return (reward - x.advantages) ** 2


def future_weighted(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-min(min(rho, delta) f A, clip(rho) f A), f_t = sg clip(exp(sum_{k >= t} g^(k - t) log rho_k), 1, 1 + fipo_clip).

    FIPO, arXiv 2603.19835; g = 2^(-1 / fipo_half_life). Readings: (1) the sum begins at the token itself, and k counts
    every position between, masked ones too; (2) tokens of rho above `delta` are left out of it; (3) the clip is the one
    of its largest model, from 1 up; (4) its further cap, where A < 0 and rho is large, is left out: delta bounds these.
    """
    log_ratio = x.log_ratio.detach()
    if loss.delta is not None:
        log_ratio = log_ratio * (log_ratio.exp() <= loss.delta)
    future, step, decay = log_ratio, 1, 2 ** (-1 / loss.fipo_half_life)
    while step < future.shape[1]:  # each round doubles how many tokens the sums have
        future = future + decay**step * torch.nn.functional.pad(future[:, step:], (0, step))
        step *= 2
    f = future.exp().clamp(1, 1 + loss.fipo_clip)
    return clipped(x._replace(advantages=x.advantages * f), loss)


GRPO_TYPES.enter("sapo", GRPOType(soft_gate, sequence_mean), reads=("sapo_temperature_pos", "sapo_temperature_neg"))
GRPO_TYPES.enter("cfpo", GRPOType(quadratic, sequence_mean), reads=("epsilon",))
GRPO_TYPES.enter("pspo", GRPOType(smoothed, sequence_mean), reads=("pspo_alpha",))
GRPO_TYPES.enter("prime", GRPOType(penalized, token_mean, weighs=True), reads=("log_ratio_coef",))
GRPO_TYPES.enter(
    "fipo",
    GRPOType(future_weighted, token_mean, clip=ratio_range),
    reads=(*CLIP, "delta", "fipo_half_life", "fipo_clip"),
)
GRPO_TYPES.enter(
    "a2po",
    GRPOType(regressed, sequence_mean, sequence_term=True, corrected=(), of_tokens=False, to_reference=True),
    reads=("a2po_beta",),
    ignores=(*WHOLE, "beta", "kl_estimator", "top_entropy_quantile"),
)
