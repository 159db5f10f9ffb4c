"""Lengths: sums or averages over tokens, and a price of a token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..advantages.statistics import mean_of, std_of
from ..dpo import DPOLoss
from .base import PairRatios, dpo_type


@dpo_type(divergences=True)
def ipo_sum(r: PairRatios, loss: DPOLoss) -> Tensor:
    """(r_w - r_l - 1/(2 beta))^2, arXiv 2310.12036 Eq. 17 as it stands, in sums."""
    return (r.margin - 1 / (2 * loss.beta)) ** 2


@dpo_type(divergences=True, averages=True)
def sigmoid_norm(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-beta (r_w/|y_w| - r_l/|y_l|)), Tulu 3, arXiv 2411.15124 Sec. 4.3."""
    return -logsigmoid(loss.beta * r.average_margin)


@dpo_type(reads=("r_dpo_alpha",))
def r_dpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-(x + alpha (|y_w| - |y_l|))), arXiv 2403.19159: a pair whose chosen is longer weighs less."""
    return -logsigmoid(loss.beta * r.margin + loss.r_dpo_alpha * (r.chosen_lengths - r.rejected_lengths))


@dpo_type(averages=True, reads=("rainbow_mu", "rainbow_gamma"))
def rainbow(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-beta (D - mu D_ref - (1 - mu) gamma)), D, D_ref average log p_w minus average log p_l, arXiv 2410.04203.

    mu = 1 is sigmoid_norm, mu = 0 is SimPO with a margin of beta gamma.
    """
    own = r.chosen_logps / r.chosen_lengths - r.rejected_logps / r.rejected_lengths
    reference = r.ref_chosen_logps / r.chosen_lengths - r.ref_rejected_logps / r.rejected_lengths
    to_beat = loss.rainbow_mu * reference + (1 - loss.rainbow_mu) * loss.rainbow_gamma
    return -logsigmoid(loss.beta * (own - to_beat))


@dpo_type(whole_step=True, averages=True, reads=("alpha_dpo_coef", "rainbow_gamma"))
def alpha_dpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-beta (D - gamma - alpha z)), z the standard score of D - D_ref in the step, arXiv 2410.10148; D as above.

    z has no gradient. Reading: mean and standard deviation (Bessel's) are the step's; the authors' code takes running
    ones, of momentum 0.9 and with this step's in. z is 0 where the step's pairs are alike, or there is one.
    """
    own = r.chosen_logps / r.chosen_lengths - r.rejected_logps / r.rejected_lengths
    return -logsigmoid(loss.beta * (own - loss.rainbow_gamma - loss.alpha_dpo_coef * standard_score(r)))


def standard_score(r: PairRatios) -> Tensor:
    """[P], how many standard deviations a pair's average margin lies above the mean of the step."""
    if r.totals.collected is None or r.totals.own is None:
        raise ValueError("alpha_dpo compares the pairs of the whole step: it needs totals.collected and totals.own")
    gaps = r.totals.collected[:, 4]
    spread = std_of(gaps, 0)
    differ = spread > 1e-6 * gaps.nan_to_num().abs().max()  # by more than rounding
    scores = torch.where(differ, (gaps - mean_of(gaps, 0)) / spread, 0.0)
    return scores[r.totals.own].to(r.chosen).nan_to_num()
