"""What of GRPO some tokens of the step alone have: those of high entropy, those of right answers, those clipped."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..metrics import Mean
from ..types import CompletionLogps, Totals, divide
from .base import GRPO_TYPES, Ratios

if TYPE_CHECKING:
    from ..grpo import GRPOLoss


def top_entropy(policy: CompletionLogps, totals: Totals, share: float) -> tuple[Tensor, float | Tensor]:
    """[C, T] bool, scored tokens in the step's top `share` of entropies (arXiv 2506.01939), and their number there,
    at least 1."""
    if share >= 1:
        return policy.completion_mask, max(totals.num_tokens, 1)
    if totals.collected is None:
        raise ValueError("top_entropy_quantile needs the entropies of the whole step in totals.collected")
    entropies = totals.collected[:, -1]
    if not len(entropies):
        return policy.completion_mask, 1
    # what is at least the quantile is at least the next order statistic; torch.quantile takes no more than 2^24
    rank = math.ceil((1 - share) * (len(entropies) - 1) - 1e-9)
    threshold = entropies.kthvalue(rank + 1).values
    kept = policy.completion_mask & (policy.needed("entropy").detach() >= threshold)
    return kept, (entropies >= threshold).sum()


def positive_nll(x: Ratios, mask: Tensor, totals: Totals) -> tuple[Tensor, Mean]:
    """This micro-batch's part of the mean of -log p over the step's tokens of A > 0, and that mean as a metric.

    VAPO's loss of right answers, arXiv 2504.05118. Readings: (1) an answer is right where its advantage is positive, so
    that of a prompt whose answers are all right, which have A = 0, none counts; (2) neither clip, entropy's quantile,
    off-policy mask nor sampling correction touches it. 0 where the step has no such token.
    """
    if totals.num_positive_tokens is None:
        raise ValueError("positive_nll_coef divides by totals.num_positive_tokens, which is None")
    positive = mask & (x.advantages > 0)
    return divide(-(x.logps * positive).sum(), totals.num_positive_tokens), Mean.of(-x.logps, positive)


@torch.no_grad()
def clip_metrics(x: Ratios, loss: GRPOLoss, mask: Tensor) -> dict[str, Mean]:
    """Shares of scored tokens below, above and outside of the range in which the loss_type does not clip; none, if it
    clips nothing."""
    clip = GRPO_TYPES[loss.loss_type].clip
    if clip is None:
        return {}
    measure, low, high = clip(x, loss)
    below = ((measure < low) & (x.advantages < 0)).expand(mask.shape).to(x.ratio.dtype)
    above = ((measure > high) & (x.advantages > 0)).expand(mask.shape).to(x.ratio.dtype)
    return {
        "clip_ratio/low_mean": Mean.of(below, mask),
        "clip_ratio/high_mean": Mean.of(above, mask),
        "clip_ratio/region_mean": Mean.of(below + above, mask),
    }
