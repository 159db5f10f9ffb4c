"""Pairs with a reference model: DPO and everything that kept its name. The formulas are in `dpo_pairs.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from logratio.reference.oracle._math import zero
from logratio.reference.oracle.dpo_pairs import TAKES_F_DIVERGENCE, Options, Pair, aot, dr_dpo, mean_delta, pair_loss


def dpo(
    chosen: Sequence[Tensor],
    rejected: Sequence[Tensor],
    ref_chosen: Sequence[Tensor],
    ref_rejected: Sequence[Tensor],
    *,
    chosen_log_sum_p2: Sequence[Tensor] | None = None,
    rejected_log_sum_p2: Sequence[Tensor] | None = None,
    ref_entropies: Sequence[Sequence[Tensor]] | None = None,
    margins: Sequence[float] | None = None,
    beta_dpo_mean: float = 0.0,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    **options: Any,
) -> Tensor:
    """Mean over pairs of sum_j c_j L_j, c = loss_weights (1 each), L_j of `loss_type`; `options` as in `Options`.

    log_sum_p2: log sum_v p_v^2 of each token's distribution, for use_weighting. ref_entropies: of the reference's, in
    nats, of chosen and rejected, for mallows. margins: of the pairs, for odpo, modpo, sppo. beta_dpo_mean: beta_dpo's
    running mean of Delta before this step.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    o = Options(**options)
    pairs = _pairs(chosen, rejected, ref_chosen, ref_rejected, o, margins, ref_entropies)
    total = zero([*chosen, *rejected])
    for name, weight in zip(names, weights, strict=True):
        if o.f_divergence_type != "reverse_kl" and name not in TAKES_F_DIVERGENCE:
            raise ValueError(f"loss_type={name!r} has no form with f_divergence_type={o.f_divergence_type!r}")
        scored = [pair for pair in pairs if pair is not None]
        if name in ("aot", "aot_unpaired", "dr_dpo"):
            if o.use_weighting:
                raise ValueError(f"loss_type={name!r} tears the pairs apart that use_weighting would weigh")
            if name == "dr_dpo":
                of_step = len(scored) * dr_dpo(scored, o) if scored else 0.0
            else:
                of_step = aot(name, scored, o)
            total = total + weight * of_step / max(len(pairs), 1)
            continue
        if name == "mallows" and ref_entropies is None:
            raise ValueError("loss_type='mallows' needs ref_entropies")
        if name in ("odpo", "modpo", "sppo") and margins is None:
            raise ValueError(f"loss_type={name!r} needs margins")
        for i, pair in enumerate(pairs):
            if pair is None:
                continue
            if name == "sft":  # its share of the token mean over the step's chosen tokens: no 1 / number of pairs
                loss = pair.nll_w / max(sum(len(y) for y in chosen), 1)
            else:
                loss = pair_loss(name, pair, scored, beta_dpo_mean, o) / len(pairs)
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
    return o.beta_dpo_momentum * beta_dpo_mean + (1 - o.beta_dpo_momentum) * mean_delta(scored)


# ---------------------------------------------------------------------------------------------- what makes up a pair
def _pairs(
    chosen: Sequence[Tensor],
    rejected: Sequence[Tensor],
    ref_chosen: Sequence[Tensor],
    ref_rejected: Sequence[Tensor],
    o: Options,
    margins: Sequence[float] | None = None,
    ref_entropies: Sequence[Sequence[Tensor]] | None = None,
) -> list[Pair | None]:
    """None for a pair with nothing to score."""
    pairs: list[Pair | None] = []
    deltas = [0.0] * len(chosen) if margins is None else margins
    told: list[tuple[Tensor, ...]] = [()] * len(chosen)
    if ref_entropies is not None:
        told = list(zip(*ref_entropies, strict=True))
    for i, (y_w, y_l, ref_w, ref_l) in enumerate(zip(chosen, rejected, ref_chosen, ref_rejected, strict=True)):
        if len(y_w) + len(y_l) == 0:
            pairs.append(None)
            continue
        shared = min(len(y_w), len(y_l))
        refs = [torch.zeros_like(y) if o.reference_free else y.detach() for y in (ref_w, ref_l)]
        own = [_clipped(y, ref, o.humanline_clip) for y, ref in zip((y_w, y_l), refs, strict=True)]
        if o.down_sample:
            own, refs = ([_sampled(y, shared) for y in sides] for sides in (own, refs))
        S_w, S_l, R_w, R_l = (_sum(y, shared, o.ld_alpha) for y in (*own, *refs))
        means = [math.fsum(h.tolist()) / len(h) for h in told[i] if len(h)]
        pairs.append(
            Pair(
                *(S_w, S_l, R_w, R_l),
                length_w=len(y_w),
                length_l=len(y_l),
                nll_w=-y_w.sum(),
                delta=float(deltas[i]),
                entropy=math.fsum(means) / max(len(means), 1),
            )
        )
    return pairs


def _sum(logps: Tensor, shared: int, ld_alpha: float | None) -> Tensor:
    """The sum; with LD-DPO (arXiv 2409.06411) tokens past the shorter completion's length count ld_alpha each."""
    if ld_alpha is None:
        return logps.sum()
    return logps[:shared].sum() + ld_alpha * logps[shared:].sum()


def _sampled(logps: Tensor, count: int) -> Tensor:
    """SamPO (arXiv 2406.10957 Eq. 10): `count` of the n tokens, the j-th of them token ceil(j n / count)."""
    at = [math.ceil(j * len(logps) / count) - 1 for j in range(1, count + 1)]
    return logps[at]


def _clipped(logps: Tensor, ref: Tensor, within: tuple[float, float] | None) -> Tensor:
    """Log-probs whose ratios to the reference lie within: a token outside is a constant, arXiv 2509.24207."""
    if within is None or len(logps) == 0:
        return logps
    tokens = []
    for p, q in zip(logps, ref, strict=True):
        d = float((p - q).detach())
        tokens.append(p if within[0] <= d <= within[1] else q + min(max(d, within[0]), within[1]))
    return torch.stack(tokens)


def _wpo(logps: Tensor, log_sum_p2: Tensor) -> float:
    """exp(mean_t(log p - log sum_v p_v^2)), no gradient: arXiv 2406.11827 Eq. 2, sampled alignment."""
    return math.exp(float((logps.detach() - log_sum_p2.detach()).sum()) / max(len(logps), 1))
