"""What compares a pair with the other pairs of the optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..dpo import DPOLoss
from .base import PairRatios, dpo_type
from .labels import smoothed


@dpo_type(whole_step=True, pairwise=False, reads=("label_smoothing",))
def aot(r: PairRatios, loss: DPOLoss) -> Tensor:
    """Smoothed sp(-beta (u_k - v_k)), u, v the step's margins log p_w - log p_l of policy and reference, each sorted.

    arXiv 2406.05882: the policy's margins shall dominate the reference's in distribution, not pair by pair.
    """
    matched = same_rank(r, 0, 1)
    return smoothed(loss.beta * (r.chosen_logps - r.rejected_logps - matched), loss.label_smoothing)


@dpo_type(whole_step=True, pairwise=False, reads=("label_smoothing",))
def aot_unpaired(r: PairRatios, loss: DPOLoss) -> Tensor:
    """Smoothed sp(-beta (u_k - v_k)), u = r_w and v = r_l of the step, each sorted, arXiv 2406.05882.

    Both sides of a match have a gradient and may lie in different micro-batches: each pair accounts for the matches of
    its own two sides, half the value and the whole gradient of its side.
    """
    of_chosen = smoothed(loss.beta * (r.chosen - same_rank(r, 2, 3)), loss.label_smoothing)
    of_rejected = smoothed(loss.beta * (same_rank(r, 3, 2) - r.rejected), loss.label_smoothing)
    both = of_chosen + of_rejected
    return both - 0.5 * both.detach()


def same_rank(r: PairRatios, column: int, other: int) -> Tensor:
    """[P], for each pair the `other` column's entry of the rank that its own entry has in `column` of `collected`."""
    if r.totals.collected is None or r.totals.own is None:
        raise ValueError("aot compares the pairs of the whole step: it needs totals.collected and totals.own")
    rank = r.totals.collected[:, column].argsort(stable=True).argsort()
    matched = r.totals.collected[:, other].sort().values[rank[r.totals.own]]
    return matched.to(r.chosen).nan_to_num()  # NaN only for pairs with nothing scored, which sort last on both sides


@dpo_type(whole_step=True, reads=("beta_dpo_coef", "beta_dpo_momentum"))
def beta_dpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-b (r_w - r_l)), b = max(1e-3, beta (1 + coef (mean margin of the step - M))), arXiv 2407.08639.

    M is the running mean of the steps before. The paper's filter of pairs is random and left out.
    """
    if r.totals.collected is None:
        raise ValueError("beta_dpo adapts beta to the pairs of the whole step: it needs totals.collected")
    mean = (r.totals.collected[:, 2] - r.totals.collected[:, 3]).nanmean().nan_to_num().to(r.chosen)
    beta = loss.beta * (1 + loss.beta_dpo_coef * (mean - r.totals.state.get("margin", 0.0)))
    return -logsigmoid(beta.clamp(min=1e-3) * r.margin)


@dpo_type(whole_step=True, pairwise=False, reads=("dr_dpo_beta",))
def dr_dpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """-b log(mean over the step of exp(-sp(-x) / b)), b = dr_dpo_beta, arXiv 2407.07880: large losses weigh less.

    Each pair has the value, and the gradient of its own loss times what it weighs in the mean.
    """
    if r.totals.collected is None:
        raise ValueError("dr_dpo weighs the pairs of the whole step: it needs totals.collected")
    margins = (r.totals.collected[:, 2] - r.totals.collected[:, 3]).to(r.chosen)
    scaled = logsigmoid(loss.beta * margins) / loss.dr_dpo_beta
    unknown = margins.isnan()
    log_mean = scaled.masked_fill(unknown, -torch.inf).logsumexp(0) - (~unknown).to(scaled).sum().log()
    log_mean = log_mean.nan_to_num()  # NaN where nothing of the step is scored
    own = -logsigmoid(loss.beta * r.margin)
    weight = (-own.detach() / loss.dr_dpo_beta - log_mean).exp()
    return weight * (own - own.detach()) - loss.dr_dpo_beta * log_mean
