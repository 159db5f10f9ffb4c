"""The variants of GRPO: surrogates (the policy term of a token or of a completion) and weights (the normalisers).

rho, A and the rest are those of `grpo.py`; all values are to be minimised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .divergences import MAX_EXPONENT
from .grpo import GRPO_TYPES, GRPOLoss, GRPOType, Ratios
from .types import Totals, choose, divide


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


def capped_weight(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-sg(min(rho, epsilon_high)) A log p, CISPO, arXiv 2506.13585: every token keeps a gradient."""
    return -x.ratio.clamp(max=loss.epsilons[1]).detach() * x.advantages * x.logps


def capped_range(x: Ratios, loss: GRPOLoss) -> tuple[Tensor, float, float]:
    """rho [C, T] or [C, 1], and the range in which CISPO does not cap it: it has no lower bound."""
    return x.ratio, -math.inf, loss.epsilons[1]


def soft_gate(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-(4 / tau) sigmoid(tau (rho - 1)) A, tau by the sign of A, SAPO, arXiv 2511.20347; slope -A at rho = 1."""
    tau = choose(x.advantages > 0, loss.sapo_temperature_pos, loss.sapo_temperature_neg, x.ratio)
    return -(tau * (x.ratio - 1)).sigmoid() * 4 / tau * x.advantages


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


def sequence_mean(lengths: Tensor, totals: Totals, loss: GRPOLoss) -> Tensor:
    """1 / (B |y_i|): the mean over completions of their token means."""
    return divide(1 / lengths, totals.num_sequences)


def sequence_sum(lengths: Tensor, totals: Totals, loss: GRPOLoss) -> Tensor:
    """1 / B: the mean over completions of their token sums (LUSPO, arXiv 2602.05261)."""
    return divide(torch.ones_like(lengths), totals.num_sequences)


def token_mean(lengths: Tensor, totals: Totals, loss: GRPOLoss) -> Tensor:
    """1 / N: every token of the step weighs the same (DAPO, arXiv 2503.14476 Eq. 8)."""
    return divide(torch.ones_like(lengths), totals.num_tokens)


def constant_length(lengths: Tensor, totals: Totals, loss: GRPOLoss) -> Tensor:
    """1 / (B max_completion_length): no length bias (Dr. GRPO, arXiv 2503.20783)."""
    return divide(torch.ones_like(lengths), totals.num_sequences * loss.max_completion_length)


CLIP = ("epsilon", "epsilon_high")
OF_SEQUENCES = ("sequence", "geometric")
WHOLE = ("importance_sampling_level", "use_bias_correction_kl")

for _name, _weight in {
    "dapo": token_mean,
    "grpo": sequence_mean,
    "dr_grpo": constant_length,
    "bnpo": token_mean,
    "luspo": sequence_sum,
}.items():
    GRPO_TYPES.enter(_name, GRPOType(clipped, _weight, clip=ratio_range), reads=(*CLIP, "delta"))
GRPO_TYPES.enter("sapo", GRPOType(soft_gate, sequence_mean), reads=("sapo_temperature_pos", "sapo_temperature_neg"))
GRPO_TYPES.enter(
    "cispo", GRPOType(capped_weight, token_mean, epsilon_high=5.0, clip=capped_range), reads=("epsilon_high",)
)
GRPO_TYPES.enter(
    "vespo",
    GRPOType(gamma_weight, token_mean, corrected=("token",), weighs=True),
    reads=("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    ignores=("importance_sampling_level",),
)
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
    ),
    reads=CLIP,
    ignores=WHOLE,
)
GRPO_TYPES.enter(
    "rloo",
    GRPOType(clipped_sequence, sequence_mean, clip=sequence_ratio_range, corrected=OF_SEQUENCES),
    reads=CLIP,
    ignores=(*WHOLE, "beta", "kl_estimator", "top_entropy_quantile"),  # its KL is in the reward: `reward_kl_coef`
)
