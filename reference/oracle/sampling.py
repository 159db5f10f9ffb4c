"""What a token's policy term is multiplied by where its completion was drawn by another policy, mu."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

DEFAULTS = {
    "token_truncate": (0.0, 3.0),
    "token_mask": (0.0, 3.0),
    "sequence_truncate": (0.0, 3.0),
    "sequence_mask": (0.0, 3.0),
    "geometric_truncate": (0.99, 1.01),
    "geometric_mask": (0.99, 1.01),
    "icepop": (0.5, 5.0),
    "dppo_tv": (-0.15, 0.15),
    "dppo_kl": (-0.05, 0.05),
    "ipo": (-0.2, 0.2),
}
"""correction -> (low, high)."""


def weights(y: Tensor, proximal: Tensor, behavior: Tensor, advantage: float, o: Any) -> list[float]:
    """One number a token. y, proximal, behavior: log pi, log pi_prox, log mu of one completion's tokens."""
    pi, prox, mu = (x.detach().tolist() for x in (y, proximal, behavior))
    if o.sampling_correction == "none":
        return [1.0] * len(pi)
    w = [math.exp(a - b) for a, b in zip(prox, mu, strict=True)]
    if o.sampling_correction == "decoupled":  # arXiv 2505.24298 Eq. 5
        return w
    low, high = DEFAULTS[o.sampling_correction]
    low = low if o.sampling_clip_min is None else o.sampling_clip_min
    high = high if o.sampling_clip_max is None else o.sampling_clip_max
    if o.sampling_correction in ("dppo_tv", "dppo_kl", "ipo"):
        kept = [stays(o.sampling_correction, a, b, advantage, low, high) for a, b in zip(pi, mu, strict=True)]
        return [x if k else 0.0 for x, k in zip(w, kept, strict=True)]
    level, _, what = o.sampling_correction.partition("_")
    if level == "sequence":  # the ratio of the whole completion's probabilities
        w = [math.exp(math.fsum(prox) - math.fsum(mu))] * len(w)
    if level == "geometric":
        w = [math.exp((math.fsum(prox) - math.fsum(mu)) / len(w))] * len(w)
    if what == "truncate":
        return [min(max(x, low), high) for x in w]
    return [x if low <= x <= high else 0.0 for x in w]  # icepop: arXiv 2510.18855 Sec. 2.3.2


def stays(name: str, log_pi: float, log_mu: float, advantage: float, low: float, high: float) -> bool:
    """Whether a token stays in the trust region, or is on its way back."""
    pi, mu = math.exp(log_pi), math.exp(log_mu)
    if name == "ipo":  # prime-rl: both ways, whatever the advantage
        return low <= pi - mu <= high
    moved = pi - mu  # arXiv 2602.04879 Eq. 13: |pi - mu| is the total variation of two outcomes
    if name == "dppo_kl":  # Eq. 14: mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi))
        moved = math.copysign(bernoulli_kl(log_mu, log_pi), log_pi - log_mu)
    if advantage > 0:  # Eq. 12: only what the gradient would carry further out is left out
        return moved <= high
    return advantage == 0 or moved >= low


def bernoulli_kl(log_a: float, log_b: float) -> float:
    """KL(a || b) of drawing one token or another."""
    a, not_a, not_b = math.exp(log_a), -math.expm1(log_a), -math.expm1(log_b)
    if not_a == 0:
        return a * (log_a - log_b)
    if not_b == 0:
        return math.inf
    return a * (log_a - log_b) + not_a * (math.log(not_a) - math.log(not_b))
