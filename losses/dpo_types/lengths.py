"""Lengths: averages over tokens, and a price of a token."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..dpo import DPOLoss, PairRatios, dpo_type


@dpo_type(divergences=True)
def sigmoid_norm(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-beta (r_w/|y_w| - r_l/|y_l|)), Tulu 3, arXiv 2411.15124 Sec. 4.3."""
    return -logsigmoid(loss.beta * r.average_margin)


@dpo_type(reads=("r_dpo_alpha",))
def r_dpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-(x + alpha (|y_w| - |y_l|))), arXiv 2403.19159: a pair whose chosen is longer weighs less."""
    return -logsigmoid(loss.beta * r.margin + loss.r_dpo_alpha * (r.chosen_lengths - r.rejected_lengths))


@dpo_type(reads=("rainbow_mu", "rainbow_gamma"))
def rainbow(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-beta (D - mu D_ref - (1 - mu) gamma)), D, D_ref average log p_w minus average log p_l, arXiv 2410.04203.

    mu = 1 is sigmoid_norm, mu = 0 is SimPO with a margin of beta gamma.
    """
    own = r.chosen_logps / r.chosen_lengths - r.rejected_logps / r.rejected_lengths
    reference = r.ref_chosen_logps / r.chosen_lengths - r.ref_rejected_logps / r.rejected_lengths
    to_beat = loss.rainbow_mu * reference + (1 - loss.rainbow_mu) * loss.rainbow_gamma
    return -logsigmoid(loss.beta * (own - to_beat))
