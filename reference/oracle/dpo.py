"""Pairs with a reference model: DPO and everything that kept its name.

Of a pair: S is the sum of a completion's log-probabilities, |y| its number of tokens (1 where it is empty),
r = S_policy - S_reference, Delta = r_w - r_l.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logratio.reference.oracle._math import LARGEST_EXPONENT, relu, sigmoid, smoothed, softplus, zero


@dataclass(frozen=True)
class Options:
    """The options of `dpo`, with their defaults."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    discopop_tau: float = 0.05
    irpo_alpha: float = 1.0
    dpop_lambda: float = 50.0
    cal_dpo_coef: float = 0.5
    r_dpo_alpha: float = 0.1
    chi_po_r_max: float = 10.0
    rainbow_mu: float = 0.25
    rainbow_gamma: float = 0.1
    beta_dpo_coef: float = 0.6
    beta_dpo_momentum: float = 0.9  # of the state between steps, see beta_dpo_next_mean


@dataclass(frozen=True)
class Pair:
    """One pair, its sums taken: S_w, S_l of the policy, R_w, R_l of the reference."""

    S_w: Tensor
    S_l: Tensor
    R_w: Tensor
    R_l: Tensor
    length_w: int  # of scored tokens
    length_l: int
    nll_w: Tensor  # -log p summed over the chosen tokens, whatever ld_alpha is

    @property
    def r_w(self) -> Tensor:
        return self.S_w - self.R_w

    @property
    def r_l(self) -> Tensor:
        return self.S_l - self.R_l


def dpo(
    chosen: Sequence[Tensor],
    rejected: Sequence[Tensor],
    ref_chosen: Sequence[Tensor],
    ref_rejected: Sequence[Tensor],
    *,
    chosen_log_sum_p2: Sequence[Tensor] | None = None,
    rejected_log_sum_p2: Sequence[Tensor] | None = None,
    beta_dpo_mean: float = 0.0,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    **options: Any,
) -> Tensor:
    """Mean over pairs of sum_j c_j L_j, c = loss_weights (1 each), L_j of `loss_type`; `options` as in `Options`.

    log_sum_p2: log sum_v p_v^2 of each token's distribution, for use_weighting. beta_dpo_mean: beta_dpo's running mean
    of Delta before this step.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    o = Options(**options)
    pairs = _pairs(chosen, rejected, ref_chosen, ref_rejected, o)
    total = zero([*chosen, *rejected])
    for name, weight in zip(names, weights, strict=True):
        if o.f_divergence_type != "reverse_kl" and name not in TAKES_F_DIVERGENCE:
            raise ValueError(f"loss_type={name!r} has no form with f_divergence_type={o.f_divergence_type!r}")
        if name in ("aot", "aot_unpaired"):
            if o.use_weighting:
                raise ValueError(f"loss_type={name!r} tears the pairs apart that use_weighting would weigh")
            total = total + weight * _aot(name, [pair for pair in pairs if pair is not None], o) / max(len(pairs), 1)
            continue
        scored = [pair for pair in pairs if pair is not None]
        for i, pair in enumerate(pairs):
            if pair is None:
                continue
            if name == "sft":  # its share of the token mean over the step's chosen tokens: no 1 / number of pairs
                loss = pair.nll_w / max(sum(len(y) for y in chosen), 1)
            else:
                loss = _pair_loss(name, pair, scored, beta_dpo_mean, o) / len(pairs)
            if o.use_weighting:
                if chosen_log_sum_p2 is None or rejected_log_sum_p2 is None:
                    raise ValueError("use_weighting needs chosen_log_sum_p2 and rejected_log_sum_p2")
                w_w, w_l = _wpo(chosen[i], chosen_log_sum_p2[i]), _wpo(rejected[i], rejected_log_sum_p2[i])
                loss = w_w * w_l * loss
            total = total + weight * loss
    return total


def beta_dpo_next_mean(
    chosen: Sequence[Tensor],
    rejected: Sequence[Tensor],
    ref_chosen: Sequence[Tensor],
    ref_rejected: Sequence[Tensor],
    *,
    beta_dpo_mean: float = 0.0,
    **options: Any,
) -> float:
    """The running mean of Delta after this step: m M0 + (1 - m) mean over the step of Delta, m = beta_dpo_momentum."""
    o = Options(**options)
    scored = [pair for pair in _pairs(chosen, rejected, ref_chosen, ref_rejected, o) if pair is not None]
    if not scored:
        return beta_dpo_mean
    return o.beta_dpo_momentum * beta_dpo_mean + (1 - o.beta_dpo_momentum) * _mean_delta(scored)


# ---------------------------------------------------------------------------------------------- what makes up a pair
def _pairs(
    chosen: Sequence[Tensor],
    rejected: Sequence[Tensor],
    ref_chosen: Sequence[Tensor],
    ref_rejected: Sequence[Tensor],
    o: Options,
) -> list[Pair | None]:
    """None for a pair with nothing to score."""
    pairs: list[Pair | None] = []
    for y_w, y_l, ref_w, ref_l in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True):
        if len(y_w) + len(y_l) == 0:
            pairs.append(None)
            continue
        shared = min(len(y_w), len(y_l))
        S_w, S_l, R_w, R_l = (_sum(y, shared, o.ld_alpha) for y in (y_w, y_l, ref_w.detach(), ref_l.detach()))
        pairs.append(Pair(S_w, S_l, R_w, R_l, length_w=len(y_w), length_l=len(y_l), nll_w=-y_w.sum()))
    return pairs


def _sum(logps: Tensor, shared: int, ld_alpha: float | None) -> Tensor:
    """The sum; with LD-DPO (arXiv 2409.06411) tokens past the shorter completion's length count ld_alpha each."""
    if ld_alpha is None:
        return logps.sum()
    return logps[:shared].sum() + ld_alpha * logps[shared:].sum()


def _wpo(logps: Tensor, log_sum_p2: Tensor) -> float:
    """exp(mean_t(log p - log sum_v p_v^2)), no gradient: arXiv 2406.11827 Eq. 2, sampled alignment."""
    return math.exp(float((logps.detach() - log_sum_p2.detach()).sum()) / max(len(logps), 1))


def _mean_delta(pairs: Sequence[Pair]) -> float:
    return math.fsum(float((pair.r_w - pair.r_l).detach()) for pair in pairs) / len(pairs)


def _f(r: Tensor, o: Options) -> Tensor:
    """f'(e^r) of the divergence in place of r, arXiv 2309.16240; constants so that it is 0 at r = 0."""
    if o.f_divergence_type == "reverse_kl":
        return r
    if o.f_divergence_type == "forward_kl":
        return -torch.expm1((-r).clamp(max=LARGEST_EXPONENT))  # 1 - e^-r
    if o.f_divergence_type == "js_divergence":
        return math.log(2) - softplus(-r)
    if o.f_divergence_type == "alpha_divergence":
        a = o.f_alpha_divergence_coef - 1
        return r if a == 0 else torch.expm1((a * r).clamp(max=LARGEST_EXPONENT)) / a  # (u^(alpha - 1) - 1)/(alpha - 1)
    raise ValueError(f"no formula for f_divergence_type={o.f_divergence_type!r}")


# ---------------------------------------------------------------------------------------------- the losses
def _aot(name: str, pairs: Sequence[Pair], o: Options) -> Tensor:
    """Sum over ranks of the smoothed loss between two sorted vectors of the step: arXiv 2406.05882."""
    if name == "aot":  # margins of the policy against margins of the reference
        left, right = [p.S_w - p.S_l for p in pairs], [p.R_w - p.R_l for p in pairs]
    else:  # chosen against rejected log-ratios
        left, right = [p.r_w for p in pairs], [p.r_l for p in pairs]
    total = torch.zeros((), dtype=torch.float64)
    by_value = [sorted(values, key=lambda value: float(value.detach())) for values in (left, right)]
    for u, v in zip(*by_value, strict=True):
        total = total + smoothed(o.beta * (u - v), o.label_smoothing)
    return total


def _exo_pair(x: Tensor, e: float) -> Tensor:
    """KL((sigmoid(x), sigmoid(-x)) || (1 - e, e)), arXiv 2402.00856 Eq. 16."""
    if e <= 0:
        raise ValueError("exo_pair needs label_smoothing > 0")
    return sigmoid(x) * (-softplus(-x) - math.log(1 - e)) + sigmoid(-x) * (-softplus(x) - math.log(e))


def _discopop(x: Tensor, tau: float) -> Tensor:
    """(1 - m) log(1 + e^-x) + m e^-x, m = sigmoid(x / tau): arXiv 2406.08414 Eq. 5."""
    return sigmoid(-x / tau) * softplus(-x) + torch.exp(-x - softplus(-x / tau))


def _chi(r: Tensor) -> Tensor:
    """phi(e^r) = e^r + r, arXiv 2407.13399; e^40 is far outside every clip."""
    return torch.exp(r.clamp(max=40.0)) + r


# Of the log-ratio's image f(r) only, so that the divergence can be changed (arXiv 2309.16240): the constant of the
# partition function cancels in the difference. z is f(r_w) - f(r_l), zn the same with f(r) / |y|.
OF_SCORES: dict[str, Callable[[Tensor, Tensor, Options], Tensor]] = {
    # arXiv 2305.18290 Eq. 7
    "sigmoid": lambda z, zn, o: softplus(-o.beta * z),
    # arXiv 2309.06657, the hinge of SLiC with beta r as its score
    "hinge": lambda z, zn, o: relu(1 - o.beta * z),
    # arXiv 2310.12036 Eq. 17, with token means, as its authors recommend in practice
    "ipo": lambda z, zn, o: (zn - 1 / (2 * o.beta)) ** 2,
    "exo_pair": lambda z, zn, o: _exo_pair(o.beta * z, o.label_smoothing),
    # arXiv 2403.00409: unbiased where the label is wrong with probability e
    "robust": lambda z, zn, o: (
        ((1 - o.label_smoothing) * softplus(-o.beta * z) - o.label_smoothing * softplus(o.beta * z))
        / (1 - 2 * o.label_smoothing)
    ),
    "discopop": lambda z, zn, o: _discopop(o.beta * z, o.discopop_tau),
    # arXiv 2411.15124 Sec. 4.3
    "sigmoid_norm": lambda z, zn, o: softplus(-o.beta * zn),
}
TAKES_F_DIVERGENCE = {*OF_SCORES, "sft"}

OF_A_PAIR: dict[str, Callable[[Pair, Options], Tensor]] = {
    # arXiv 2402.05369, pairs
    "nca_pair": lambda p, o: softplus(-o.beta * p.r_w) + softplus(o.beta * p.r_w) / 2 + softplus(o.beta * p.r_l) / 2,
    # arXiv 2404.04656, its reward shift 0
    "bco_pair": lambda p, o: softplus(-o.beta * p.r_w) + softplus(o.beta * p.r_l),
    # arXiv 2405.00675 Eq. 4.7 with hard labels, eta = 1 / beta, over beta^2
    "sppo_hard": lambda p, o: (p.r_w - 1 / (2 * o.beta)) ** 2 + (p.r_l + 1 / (2 * o.beta)) ** 2,
    # arXiv 2408.06266 Eqs. 7, 8, each plus 1
    "apo_zero": lambda p, o: sigmoid(-o.beta * p.r_w) + sigmoid(o.beta * p.r_l),
    "apo_down": lambda p, o: sigmoid(o.beta * p.r_w) + sigmoid(-o.beta * (p.r_w - p.r_l)),
    # E. Mitchell, "A note on DPO with noisy preferences", Eq. 3
    "cdpo": lambda p, o: smoothed(o.beta * (p.r_w - p.r_l), o.label_smoothing),
    # arXiv 2404.19733: DPO and the answer's negative log-likelihood over its own length
    "irpo": lambda p, o: softplus(-o.beta * (p.r_w - p.r_l)) + o.irpo_alpha * p.nll_w / max(p.length_w, 1),
    # arXiv 2402.13228: a fine where the chosen answer got less likely
    "dpop": lambda p, o: softplus(-o.beta * (p.r_w - p.r_l - o.dpop_lambda * relu(-p.r_w))),
    # arXiv 2412.14516; the sigmoid has no beta in its authors' code
    "cal_dpo": lambda p, o: (
        softplus(-(p.r_w - p.r_l))
        + o.cal_dpo_coef * ((p.r_w - 1 / (2 * o.beta)) ** 2 + (p.r_l + 1 / (2 * o.beta)) ** 2)
    ),
    # arXiv 2403.19159: what the policy maximises is the reward less alpha |y|, so the reward is beta r + alpha |y|
    "r_dpo": lambda p, o: softplus(-(o.beta * (p.r_w - p.r_l) + o.r_dpo_alpha * (p.length_w - p.length_l))),
    # arXiv 2407.13399: the link phi in place of the logarithm, the margin clipped
    "chi_po": lambda p, o: softplus(
        -torch.clamp(o.beta * (_chi(p.r_w) - _chi(p.r_l)), -2 * o.chi_po_r_max, 2 * o.chi_po_r_max)
    ),
    # arXiv 2410.04203: the home advantage is a mixture of the reference's margin and a constant
    "rainbow": lambda p, o: softplus(
        -o.beta
        * (
            (p.S_w / max(p.length_w, 1) - p.S_l / max(p.length_l, 1))
            - o.rainbow_mu * (p.R_w / max(p.length_w, 1) - p.R_l / max(p.length_l, 1))
            - (1 - o.rainbow_mu) * o.rainbow_gamma
        )
    ),
}


def _pair_loss(name: str, p: Pair, step: Sequence[Pair], beta_dpo_mean: float, o: Options) -> Tensor:
    """The loss of one pair of the step."""
    if name in OF_SCORES:
        f_w, f_l = _f(p.r_w, o), _f(p.r_l, o)
        return OF_SCORES[name](f_w - f_l, f_w / max(p.length_w, 1) - f_l / max(p.length_l, 1), o)
    if name in OF_A_PAIR:
        return OF_A_PAIR[name](p, o)
    if name == "beta_dpo":  # arXiv 2407.08639: beta follows how far the step's mean margin is from the usual one
        beta = max(1e-3, o.beta * (1 + o.beta_dpo_coef * (_mean_delta(step) - beta_dpo_mean)))
        return softplus(-beta * (p.r_w - p.r_l))
    raise ValueError(f"no formula for DPO's loss_type={name!r}")
