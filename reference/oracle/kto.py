"""Single answers with a label: KTO and its relatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from logratio.reference.oracle._math import sigmoid, softplus, zero


def kto(
    logps: Sequence[Tensor],
    ref_logps: Sequence[Tensor],
    labels: Sequence[bool],
    kl_logps: Sequence[Tensor] | None = None,
    kl_ref_logps: Sequence[Tensor] | None = None,
    *,
    weights: Sequence[float] | None = None,
    bco_state: tuple[float, int] = (0.0, 0),
    beta: float = 0.1,
    humanline_clip: tuple[float, float] | None = None,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Mean over examples. weights: of each example, beside that of its label.

    kl_*: completions of other examples under this step's prompts, for z_0 of `kto` (no gradient); the others need
    none. bco_state: the mean of beta r over the examples of all steps before this one, and their number.
    """
    logps = [_clipped(y, ref, humanline_clip) for y, ref in zip(logps, ref_logps, strict=True)]
    if kl_logps is not None and kl_ref_logps is not None:
        kl_logps = [_clipped(y, ref, humanline_clip) for y, ref in zip(kl_logps, kl_ref_logps, strict=True)]
    shift = 0.0
    if loss_type == "kto":
        if kl_logps is None or kl_ref_logps is None:
            raise ValueError("loss_type='kto' needs kl_logps and kl_ref_logps")
        mismatched = [float(p.detach().sum() - q.detach().sum()) for p, q in zip(kl_logps, kl_ref_logps, strict=True)]
        shift = max(0.0, math.fsum(mismatched) / len(mismatched))  # arXiv 2402.01306, the estimate below Eq. 8
    elif loss_type == "bco":
        shift = bco_next_state(logps, ref_logps, bco_state=bco_state, beta=beta)[0]
    total = zero(logps)
    own_weights = [1.0] * len(labels) if weights is None else weights
    for y, ref, desirable, own in zip(logps, ref_logps, labels, own_weights, strict=True):
        if len(y) == 0:
            continue
        r = y.sum() - ref.detach().sum()
        weight = own * (desirable_weight if desirable else undesirable_weight)
        if loss_type == "kto":  # arXiv 2402.01306 Eqs. 7, 8: lambda_y - v(x, y)
            # v = lambda_D sigmoid(beta (r - z_0)), or lambda_U sigmoid(beta (z_0 - r))
            value = beta * (r - shift) if desirable else beta * (shift - r)
            total = total + weight * sigmoid(-value)
        elif loss_type == "apo_zero_unpaired":  # arXiv 2408.06266 Eq. 7, one answer at a time: the reference point is 0
            total = total + weight * (sigmoid(-beta * r) if desirable else sigmoid(beta * r))
        elif loss_type == "bco":  # arXiv 2404.04656: -log sigmoid(beta r - delta), or -log sigmoid(-(beta r - delta))
            total = total + weight * (softplus(-(beta * r - shift)) if desirable else softplus(beta * r - shift))
        else:
            raise ValueError(f"no formula for KTO's loss_type={loss_type!r}")
    return total / max(len(logps), 1)


def _clipped(logps: Tensor, ref: Tensor, within: tuple[float, float] | None) -> Tensor:
    """Log-probs whose ratios to the reference lie within: a token outside is a constant, arXiv 2509.24207."""
    if within is None or len(logps) == 0:
        return logps
    ratios = [float((p - q).detach()) for p, q in zip(logps, ref, strict=True)]
    outside = [q.detach() + min(max(d, within[0]), within[1]) for q, d in zip(ref, ratios, strict=True)]
    return torch.stack(
        [p if within[0] <= d <= within[1] else x for p, d, x in zip(logps, ratios, outside, strict=True)]
    )


def bco_next_state(
    logps: Sequence[Tensor],
    ref_logps: Sequence[Tensor],
    *,
    bco_state: tuple[float, int] = (0.0, 0),
    beta: float = 0.1,
) -> tuple[float, int]:
    """BCO's delta: the mean of beta r over every example seen, those of this step included, and their number.

    An example with nothing to score has no reward and takes no part.
    """
    mean, count = bco_state
    total = mean * count
    for y, ref in zip(logps, ref_logps, strict=True):
        if len(y):
            total += beta * float(y.detach().sum() - ref.detach().sum())
            count += 1
    return (total / count if count else mean), count
