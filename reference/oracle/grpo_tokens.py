"""GRPO's surrogates of one token, or of one whole completion; `o` are the `Options` of `grpo.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from logratio.reference.oracle._math import sigmoid

if TYPE_CHECKING:
    from logratio.reference.oracle.grpo import Options


def policy_term(y: Tensor, old: Tensor, t: int, ratio: Tensor, advantage: float, o: Options) -> Tensor:
    """The policy's loss of one token; `ratio` is the token's, or its whole sequence's."""
    if o.loss_type == "cispo":  # arXiv 2506.13585: the weight is clipped and not differentiated, no lower bound
        weight = min(float(ratio.detach()), o.high)
        return -(weight if o.epsilon is None else max(weight, 1 - o.epsilon)) * advantage * y[t]
    if o.loss_type in OTHERS:
        return OTHERS[o.loss_type](y, old, t, ratio, advantage, o)
    if o.loss_type == "sapo":  # arXiv 2511.20347
        tau = o.sapo_temperature_pos if advantage > 0 else o.sapo_temperature_neg
        return -(4 / tau) * sigmoid(tau * (ratio - 1)) * advantage
    clipped = torch.clamp(ratio, 1 - o.low, 1 + o.high)  # epsilon_high: arXiv 2503.14476 Sec. 3.1
    if o.delta is not None:
        ratio = torch.clamp(ratio, max=o.delta)  # arXiv 2505.07291: bounded where A < 0 too
    return -torch.minimum(ratio * advantage, clipped * advantage)  # 2402.03300 Eq. 3


def _reinforce(y: Tensor, old: Tensor, t: int, ratio: Tensor, advantage: float, o: Options) -> Tensor:
    """The score function: no ratio at all."""
    return -advantage * y[t]


def _topr(y: Tensor, old: Tensor, t: int, ratio: Tensor, advantage: float, o: Options) -> Tensor:
    """arXiv 2503.14286: [pi / mu]_0^1 of the whole answer where it is bad, 1 where it is good."""
    whole = math.exp(min(float((y.detach() - old).sum()), 0.0))
    return -(1.0 if advantage >= 0 else whole) * advantage * y[t]


def _kimi(y: Tensor, old: Tensor, t: int, ratio: Tensor, advantage: float, o: Options) -> Tensor:
    """arXiv 2501.12599, of the gradient Eq. 3, its penalty of the whole answer in equal parts at every token."""
    return -advantage * y[t] + o.log_ratio_coef / 2 * (y - old).sum() ** 2 / len(y)


def _cfpo(y: Tensor, old: Tensor, t: int, ratio: Tensor, advantage: float, o: Options) -> Tensor:
    """arXiv 2601.22801 Eq. 7, negated."""
    return -(ratio * advantage - abs(advantage) / (2 * o.low) * (ratio - 1) ** 2)


def _pspo(y: Tensor, old: Tensor, t: int, ratio: Tensor, advantage: float, o: Options) -> Tensor:
    """arXiv 2509.21282: ((1 - alpha) pi + alpha pi_old) / pi_old."""
    mixed = (1 - o.pspo_alpha) * torch.exp(y[t]) + o.pspo_alpha * torch.exp(old[t])
    if o.importance_sampling_level != "token":
        return -((1 - o.pspo_alpha) * ratio + o.pspo_alpha) * advantage
    return -mixed / torch.exp(old[t]) * advantage


def _fipo(y: Tensor, old: Tensor, t: int, ratio: Tensor, advantage: float, o: Options) -> Tensor:
    """arXiv 2603.19835: DAPO's loss with A times what the tokens from here on have gained, discounted."""
    future = 0.0
    for k in range(t, len(y)):
        gain = float(y[k].detach() - old[k])
        if o.delta is None or math.exp(gain) <= o.delta:
            future += 2 ** (-(k - t) / o.fipo_half_life) * gain
    scaled = advantage * min(max(math.exp(min(future, 40.0)), 1.0), 1 + o.fipo_clip)
    capped = ratio if o.delta is None else torch.clamp(ratio, max=o.delta)
    return -torch.minimum(capped * scaled, torch.clamp(ratio, 1 - o.low, 1 + o.high) * scaled)


OTHERS = {"reinforce": _reinforce, "topr": _topr, "kimi": _kimi, "cfpo": _cfpo, "pspo": _pspo, "fipo": _fipo}
"""loss_type -> (y, old, t, ratio, advantage, options) -> the loss of token t."""


def vespo_weight(y: Tensor, old: Tensor, advantage: float, o: Options, w: Sequence[float]) -> float:
    """phi(W) = e^lambda W^k e^(-lambda W), arXiv 2602.10693 Sec. 3.4, with its authors' bounds; no gradient."""
    log_w = math.fsum(min(max(x, -20.0), 20.0) for x in (y.detach() - old).tolist())
    log_w += math.fsum(min(math.log(max(x, 1e-8)), 20.0) for x in w)
    log_w = min(max(log_w, math.log(1e-8)), 20.0)
    k, lam = (o.vespo_k_pos, o.vespo_lambda_pos) if advantage >= 0 else (o.vespo_k_neg, o.vespo_lambda_neg)
    lam = max(lam, 1e-4)
    return math.exp(lam + k * log_w - lam * math.exp(log_w))


def rloo(y: Tensor, old: Tensor, advantage: float, o: Options) -> Tensor:
    """The clipped surrogate of the whole sequence's ratio: the one action of arXiv 2402.14740, which has no clip."""
    ratio = torch.exp((y - old).sum())
    return -torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - o.low, 1 + o.high) * advantage)


def gmpo(y: Tensor, old: Tensor, advantage: float, keep: Sequence[bool], o: Options) -> Tensor:
    """-A times the geometric mean of the clipped ratios, the clip in log space: arXiv 2507.20673."""
    total, count = 0 * y.sum(), 0
    for t in range(len(y)):
        if keep[t]:
            h = y[t] - old[t]
            clipped = torch.clamp(h, -o.low, o.high)
            total = total + (torch.minimum(h, clipped) if advantage > 0 else torch.maximum(h, clipped))
            count += 1
    return -advantage * torch.exp(total / max(count, 1))
