"""DPO's formulas, of one pair each: what `dpo.py` takes the mean of.

Of a pair: S is the sum of a completion's log-probabilities, |y| its number of tokens (1 where it is empty),
r = S_policy - S_reference, Delta = r_w - r_l.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logratio.reference.oracle._math import LARGEST_EXPONENT, relu, sigmoid, smoothed, softplus


@dataclass(frozen=True)
class Options:
    """The options of `dpo`, with their defaults."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    down_sample: bool = False
    use_weighting: bool = False
    reference_free: bool = False
    humanline_clip: tuple[float, float] | None = None
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
    alpha_dpo_coef: float = 0.1
    dr_dpo_beta: float = 1.0
    odpo_alpha: float = 1.0
    modpo_weight: float = 0.5
    rejected_weight: float = 0.95
    h_dpo_alpha: float = 0.95
    focal_po_gamma: float = 0.05
    c2_dpo_lambda: float = 2e-4
    sba_lambda: float = -0.5
    mallows_phi: float = 0.29
    mallows_max_entropy: float = math.log(128256)


@dataclass(frozen=True)
class Pair:
    """One pair, its sums taken: S_w, S_l of the policy, R_w, R_l of the reference."""

    S_w: Tensor
    S_l: Tensor
    R_w: Tensor
    R_l: Tensor
    length_w: int  # of scored tokens
    length_l: int
    nll_w: Tensor  # -log p summed over the chosen tokens, whatever is summed
    delta: float = 0.0  # by how much chosen is better, as the data say
    entropy: float = 0.0  # of the reference, of a token in the mean

    @property
    def r_w(self) -> Tensor:
        return self.S_w - self.R_w

    @property
    def r_l(self) -> Tensor:
        return self.S_l - self.R_l


def mean_delta(pairs: Sequence[Pair]) -> float:
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
def aot(name: str, pairs: Sequence[Pair], o: Options) -> Tensor:
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


def _sba(log_R: Tensor, power: float) -> Tensor:
    """R^(l + 1) / (s (l + 1)) - (R^-l - 1) / (s l), s = 4: arXiv 2505.19601 Table 2, less its constant 1 / (s l)."""
    first = torch.exp(((power + 1) * log_R).clamp(max=LARGEST_EXPONENT)) / (power + 1)
    second = -log_R if power == 0 else torch.expm1((-power * log_R).clamp(max=LARGEST_EXPONENT)) / power
    return (first - second) / 4


def _cauchy_cdf(x: Tensor) -> Tensor:
    """1/2 + atan(x) / pi, far on the left atan(-1 / x) / pi, which loses no digits."""
    return torch.atan(-1 / x) / math.pi if x < -1 else 0.5 + torch.atan(x) / math.pi


def _lesser(a: Tensor, b: Tensor) -> Tensor:
    """min(a, b); where they are equal, each has half the slope."""
    return (a + b) / 2 if a == b else (a if a < b else b)


def standard_score(pair: Pair, step: Sequence[Pair]) -> float:
    """How many standard deviations (Bessel's) the pair's r_w/|y_w| - r_l/|y_l| is above the step's mean."""
    gaps = [float((p.r_w / max(p.length_w, 1) - p.r_l / max(p.length_l, 1)).detach()) for p in step]
    mean = math.fsum(gaps) / len(gaps)
    spread = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)) if len(gaps) > 1 else 0.0
    if spread <= 1e-6 * max(map(abs, gaps)):
        return 0.0
    return (float((pair.r_w / max(pair.length_w, 1) - pair.r_l / max(pair.length_l, 1)).detach()) - mean) / spread


def dr_dpo(pairs: Sequence[Pair], o: Options) -> Tensor:
    """-b log(mean over the step of e^(-loss / b)), of DPO's losses: arXiv 2407.07880."""
    losses = torch.stack([softplus(-o.beta * (p.r_w - p.r_l)) for p in pairs])
    return -o.dr_dpo_beta * (torch.logsumexp(-losses / o.dr_dpo_beta, 0) - math.log(len(pairs)))


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
    # the same equation as it stands, in sums
    "ipo_sum": lambda z, zn, o: (z - 1 / (2 * o.beta)) ** 2,
    "exo_pair": lambda z, zn, o: _exo_pair(o.beta * z, o.label_smoothing),
    # arXiv 2403.00409: unbiased where the label is wrong with probability e
    "robust": lambda z, zn, o: (
        ((1 - o.label_smoothing) * softplus(-o.beta * z) - o.label_smoothing * softplus(o.beta * z))
        / (1 - 2 * o.label_smoothing)
    ),
    "discopop": lambda z, zn, o: _discopop(o.beta * z, o.discopop_tau),
    # arXiv 2411.15124 Sec. 4.3
    "sigmoid_norm": lambda z, zn, o: softplus(-o.beta * zn),
    "sba": lambda z, zn, o: _sba(-o.beta * z, o.sba_lambda),
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
    # arXiv 2410.04203: P(w beats l) is the Cauchy distribution's, 1/2 + atan(x) / pi = 1 - atan(1 / x) / pi
    "cauchy": lambda p, o: -torch.log(_cauchy_cdf(o.beta * (p.r_w - p.r_l))),
    # arXiv 2501.06645: p^gamma log p, p = sigmoid(x)
    "focal_po": lambda p, o: (
        sigmoid(o.beta * (p.r_w - p.r_l)) ** o.focal_po_gamma * softplus(-o.beta * (p.r_w - p.r_l))
    ),
    # arXiv 2411.07595: the reward is beta (alpha log pi - log pi_ref)
    "h_dpo": lambda p, o: softplus(-o.beta * ((o.h_dpo_alpha * p.S_w - p.R_w) - (o.h_dpo_alpha * p.S_l - p.R_l))),
    # arXiv 2502.07599, lambda constant
    "dpo_shift": lambda p, o: softplus(-(o.beta * p.r_w - o.rejected_weight * o.beta * p.r_l)),
    # arXiv 2506.03557: the balanced margin min(r_w, -alpha r_l)
    "bpo": lambda p, o: softplus(-o.beta * _lesser(p.r_w, -o.rejected_weight * p.r_l)),
    # arXiv 2408.09834: only what is likelier than by the reference is a penalty
    "minor_dpo": lambda p, o: softplus(-o.beta * (p.r_w - relu(p.r_l))),
    # arXiv 2502.17507: DPO, and the square of how far log p_w + log p_l is from the reference's
    "c2_dpo": lambda p, o: softplus(-o.beta * (p.r_w - p.r_l)) + o.c2_dpo_lambda * (p.r_w + p.r_l) ** 2,
    # arXiv 2405.14953: the dispersion index of the prompt scales the reward, -log of it is read off the entropy
    "mallows": lambda p, o: softplus(
        o.mallows_phi * math.log(min(max(p.entropy / o.mallows_max_entropy, 1e-6), 1.0)) * (o.beta * (p.r_w - p.r_l))
    ),
    # arXiv 2402.10571: reward difference less its offset
    "odpo": lambda p, o: softplus(-(o.beta * (p.r_w - p.r_l) - o.odpo_alpha * p.delta)),
    # arXiv 2310.03708: (1 / w_k) (beta Delta - w_-k (difference of the other rewards))
    "modpo": lambda p, o: softplus(-(o.beta * (p.r_w - p.r_l) - (1 - o.modpo_weight) * p.delta) / o.modpo_weight),
    # arXiv 2405.00675 Eq. 4.7, eta = 1 / beta, over beta^2 as sppo_hard
    "sppo": lambda p, o: (
        (p.r_w - (1 / (1 + math.exp(-p.delta)) - 0.5) / o.beta) ** 2
        + (p.r_l - (1 / (1 + math.exp(p.delta)) - 0.5) / o.beta) ** 2
    ),
}


def pair_loss(name: str, p: Pair, step: Sequence[Pair], beta_dpo_mean: float, o: Options) -> Tensor:
    """The loss of one pair of the step."""
    if name in OF_SCORES:
        f_w, f_l = _f(p.r_w, o), _f(p.r_l, o)
        return OF_SCORES[name](f_w - f_l, f_w / max(p.length_w, 1) - f_l / max(p.length_l, 1), o)
    if name in OF_A_PAIR:
        return OF_A_PAIR[name](p, o)
    if name == "beta_dpo":  # arXiv 2407.08639: beta follows how far the step's mean margin is from the usual one
        beta = max(1e-3, o.beta * (1 + o.beta_dpo_coef * (mean_delta(step) - beta_dpo_mean)))
        return softplus(-beta * (p.r_w - p.r_l))
    if name == "alpha_dpo":  # arXiv 2410.10148: SimPO whose margin follows how far the pair is from the reference
        own = p.S_w / max(p.length_w, 1) - p.S_l / max(p.length_l, 1)
        return softplus(-o.beta * (own - (o.rainbow_gamma + o.alpha_dpo_coef * standard_score(p, step))))
    raise ValueError(f"no formula for DPO's loss_type={name!r}")
