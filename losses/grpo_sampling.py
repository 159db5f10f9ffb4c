"""What the sampler drew: corrections for completions that come from another distribution than the one that is trained.

An engine of another precision, an older version or a cut-off distribution samples from mu, `behavior`. pi is the
policy that learns, pi_prox the one that its ratio is clipped to: `old`, or pi itself without a gradient. With

    w = exp(log pi_prox - log mu)

of a token, of a whole completion (the product) or of its geometric mean, a correction multiplies the policy term of
each token by a weight: w within bounds. Weights have no gradient; the KL term and the entropy have none. What is
masked keeps its place in every divisor, as in TRL. On policy, pi = pi_prox = mu, every weight is exactly 1.

Metrics, wherever `behavior` is known: `sampling/logp_diff_mean`, `_max` of |log pi_prox - log mu| over scored tokens
(TRL's `sampling/sampling_logp_difference/mean`, `/max`); `sampling/ratio_mean`, `_min`, `_max` of w before its bounds,
of tokens, or of completions where the correction is of these (TRL's `sampling/importance_sampling_ratio/...` are of
the weight, after its bounds); and the share outside of the bounds, `sampling/truncated_mean` or
`sampling/masked_mean`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .divergences import MAX_EXPONENT
from .metrics import Largest, Mean, Smallest
from .options import Variants
from .types import CompletionLogps


class Sampled(NamedTuple):
    """What a correction sees. logps, behavior: log pi, log mu [C, T], 0 where masked. advantages: [C, 1]."""

    logps: Tensor
    behavior: Tensor
    advantages: Tensor


Bound = Callable[[Tensor, Sampled, float, float], tuple[Tensor, Tensor]]
"""(w, what was sampled, clip_min, clip_max) -> the weight, and where it is outside: [C, T] or [C, 1], as w is."""


class Correction(NamedTuple):
    """level: what one weight is of, see `LEVELS`; "probability": of a token, judged by probabilities.

    bound: None where nothing is corrected. clip_min, clip_max: the default range. outside: a metric's name for it.
    """

    level: str
    bound: Bound | None
    clip_min: float = 0.0
    clip_max: float = 3.0
    outside: str = ""

    @property
    def neutral(self) -> float:
        """Of what has to lie in the range: its value where pi and mu agree."""
        return 0.0 if self.level == "probability" else 1.0


SAMPLING_CORRECTIONS: Variants[Correction] = Variants()


def token(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """[C, T], log w of each token."""
    return log_ratio


def sequence(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """[C, 1], the sum over the completion: w is its probability's ratio."""
    return log_ratio.sum(-1, keepdim=True)


def geometric(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """[C, 1], the mean over the completion, which its length does not widen."""
    return log_ratio.sum(-1, keepdim=True) / lengths


LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": token,
    "sequence": sequence,
    "geometric": geometric,
    "probability": token,
}
"""level -> log w of (log pi_prox - log mu [C, T], lengths [C, 1])."""


def truncated(w: Tensor, s: Sampled, low: float, high: float) -> tuple[Tensor, Tensor]:
    """w held in [clip_min, clip_max]: TIS, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training" (there clip_min = 0), after arXiv 1802.01561 Sec. 4.1."""
    return w.clamp(low, high), (w < low) | (w > high)


def masked(w: Tensor, s: Sampled, low: float, high: float) -> tuple[Tensor, Tensor]:
    """w in [clip_min, clip_max], 0 outside: MIS, Liu, Li et al. 2025, "When Speed Kills Stability"; of tokens with both
    bounds it is IcePop's M(k), arXiv 2510.18855 Sec. 2.3.2 (arXiv 2512.16144 Eq. 1)."""
    return zeroed(w, (w < low) | (w > high))


def proximal_over_behavior(w: Tensor, s: Sampled, low: float, high: float) -> tuple[Tensor, Tensor]:
    """w itself: decoupled PPO, arXiv 2505.24298 Eq. 5 (arXiv 2110.00641), whose clip is to pi_prox."""
    return w, torch.zeros_like(w, dtype=torch.bool)


def probability_difference(w: Tensor, s: Sampled, low: float, high: float) -> tuple[Tensor, Tensor]:
    """w where pi - mu is in [clip_min, clip_max], 0 outside, whatever the advantage: prime-rl's IPO (INTELLECT Policy
    Optimization)."""
    moved = difference(s)
    return zeroed(w, (moved < low) | (moved > high))


def binary_total_variation(w: Tensor, s: Sampled, low: float, high: float) -> tuple[Tensor, Tensor]:
    """w, but 0 where pi - mu > clip_max and A > 0, or pi - mu < clip_min and A < 0: DPPO, arXiv 2602.04879 Eq. 12 with
    the divergence of Eq. 13; also prime-rl's default."""
    return zeroed(w, further(difference(s), s.advantages, low, high))


def binary_kl(w: Tensor, s: Sampled, low: float, high: float) -> tuple[Tensor, Tensor]:
    """w, but 0 where D > clip_max and A > 0, or D < clip_min and A < 0, with D = KL(mu || pi) of drawing the token or
    another, negative where pi < mu: DPPO, arXiv 2602.04879 Eq. 12 with the divergence of Eq. 14."""
    mu, others = s.behavior.exp(), -torch.expm1(s.behavior)
    kl = mu * (s.behavior - s.logps) + torch.xlogy(others, others) - torch.xlogy(others, -torch.expm1(s.logps))
    return zeroed(w, further(kl.copysign(s.logps - s.behavior), s.advantages, low, high))


def difference(s: Sampled) -> Tensor:
    """pi - mu of the drawn token, by which the total variation of drawing it or another differs."""
    return s.logps.exp() - s.behavior.exp()


def further(moved: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Where the gradient would take a token that has moved too far still further."""
    return ((moved > high) & (advantages > 0)) | ((moved < low) & (advantages < 0))


def zeroed(w: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """What is not a number stays so, and is found out."""
    return torch.where(outside, 0.0, w), outside


RANGE = ("sampling_clip_min", "sampling_clip_max")

SAMPLING_CORRECTIONS.enter("none", Correction("token", None))
for _name, _level, _low, _high in (
    ("token", "token", 0.0, 3.0),  # TRL's default
    ("sequence", "sequence", 0.0, 3.0),
    ("geometric", "geometric", 0.99, 1.01),  # SkyRL's
):
    SAMPLING_CORRECTIONS.enter(
        f"{_name}_truncate", Correction(_level, truncated, _low, _high, "truncated"), reads=RANGE
    )
    SAMPLING_CORRECTIONS.enter(f"{_name}_mask", Correction(_level, masked, _low, _high, "masked"), reads=RANGE)
SAMPLING_CORRECTIONS.enter("icepop", Correction("token", masked, 0.5, 5.0, "masked"), reads=RANGE)
SAMPLING_CORRECTIONS.enter("decoupled", Correction("token", proximal_over_behavior))
for _name, _bound, _width in (
    ("dppo_tv", binary_total_variation, 0.15),
    ("dppo_kl", binary_kl, 0.05),
    ("ipo", probability_difference, 0.2),
):
    SAMPLING_CORRECTIONS.enter(_name, Correction("probability", _bound, -_width, _width, "masked"), reads=RANGE)


def clip_range(loss: Any) -> tuple[float, float]:
    """The correction's range. ValueError where it leaves out what is right where sampling and training agree."""
    name = loss.sampling_correction
    kind = SAMPLING_CORRECTIONS[name]
    low = kind.clip_min if loss.sampling_clip_min is None else loss.sampling_clip_min
    high = kind.clip_max if loss.sampling_clip_max is None else loss.sampling_clip_max
    if kind.level != "probability" and low < 0:
        raise ValueError(f"sampling_clip_min={low:g} must not be negative for {name}: no ratio is below 0")
    if not low <= kind.neutral <= high:
        raise ValueError(
            f"sampling_clip_min={low:g} and sampling_clip_max={high:g} must have {kind.neutral:g} between them for "
            f"sampling_correction {name}: it is what they bound where sampling and training agree"
        )
    return low, high


def check_correction(loss: Any, levels: Collection[str]) -> None:
    """Raise ValueError for a range that means nothing, or where the loss_type takes only other `levels`."""
    clip_range(loss)
    name = loss.sampling_correction
    if name != "none" and SAMPLING_CORRECTIONS[name].level not in levels:
        fitting = [key for key, kind in SAMPLING_CORRECTIONS.items() if kind.level in levels and key != "none"]
        instead = f"take one of: {', '.join(fitting)}" if fitting else "leave it out"
        raise ValueError(f"sampling_correction={name} does not fit loss_type {loss.loss_type}; {instead}")


@torch.no_grad()
def log_sampled(policy: CompletionLogps, behavior: CompletionLogps | None) -> Tensor | None:
    """log pi - log mu [C, T], 0 where masked; None where nobody says what sampled."""
    return None if behavior is None else policy.logps - behavior.logps


@torch.no_grad()
def correct(
    loss: Any, policy: CompletionLogps, old: CompletionLogps | None, behavior: CompletionLogps, advantages: Tensor
) -> tuple[Tensor | None, dict[str, Mean]]:
    """The weight [C, T] or [C, 1], 1 where masked, None where nothing is corrected; and metrics. advantages: [C, 1]."""
    kind, mask = SAMPLING_CORRECTIONS[loss.sampling_correction], policy.completion_mask
    log_ratio = (policy if old is None else old).logps - behavior.logps
    exponent = LEVELS[kind.level](log_ratio, policy.lengths.clamp(min=1)[:, None])
    where = mask if exponent.shape == mask.shape else mask.any(-1, keepdim=True)
    w = exponent.clamp(max=MAX_EXPONENT).exp()
    metrics = {
        "sampling/logp_diff_mean": Mean.of(log_ratio.abs(), mask),
        "sampling/logp_diff_max": Largest.of(log_ratio.abs(), mask),
        "sampling/ratio_mean": Mean.of(w, where),
        "sampling/ratio_min": Smallest.of(w, where),
        "sampling/ratio_max": Largest.of(w, where),
    }
    weight = None
    if kind.bound is not None:
        weight, outside = kind.bound(w, Sampled(policy.logps, behavior.logps, advantages), *clip_range(loss))
        if kind.outside:
            metrics[f"sampling/{kind.outside}_mean"] = Mean.of(outside.to(w.dtype), where)
    return weight, metrics
