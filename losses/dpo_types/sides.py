"""Each side on its own: absolute rewards, not their difference alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..dpo import DPOLoss
from .base import PairRatios, dpo_type


@dpo_type()
def nca_pair(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-b r_w) + sp(b r_w)/2 + sp(b r_l)/2, arXiv 2402.05369: r_w has a finite optimum, sigmoid(b r_w) = 2/3."""
    chosen, rejected = loss.beta * r.chosen, loss.beta * r.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@dpo_type()
def bco_pair(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-b r_w) + sp(b r_l), arXiv 2404.04656 without its shift delta, as in TRL (`bco` of KTO has it)."""
    return -logsigmoid(loss.beta * r.chosen) - logsigmoid(-loss.beta * r.rejected)


@dpo_type()
def sppo_hard(r: PairRatios, loss: DPOLoss) -> Tensor:
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2, arXiv 2405.00675 Eq. 4.7 with P = 1 for chosen."""
    target = 0.5 / loss.beta
    return (r.chosen - target) ** 2 + (r.rejected + target) ** 2


@dpo_type()
def apo_zero(r: PairRatios, loss: DPOLoss) -> Tensor:
    """1 - s(b r_w) + s(b r_l), arXiv 2408.06266 Eq. 7: raises chosen, lowers rejected."""
    return (-loss.beta * r.chosen).sigmoid() + (loss.beta * r.rejected).sigmoid()


@dpo_type()
def apo_down(r: PairRatios, loss: DPOLoss) -> Tensor:
    """s(b r_w) + 1 - s(x), arXiv 2408.06266 Eq. 8: lowers both, rejected more.

    For chosen completions that are worse than the model's own; at the reference chosen has no gradient.
    """
    return (loss.beta * r.chosen).sigmoid() + (-loss.beta * r.margin).sigmoid()


@dpo_type(reads=("dpop_lambda",))
def dpop(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-beta (r_w - r_l - lambda max(0, -r_w))), DPO-Positive (Smaug), arXiv 2402.13228.

    The kink is at r_w = 0, where training begins: there torch's relu has slope 0 and this is plain DPO; just below,
    the slope in r_w is 1 + lambda times as steep.
    """
    return -logsigmoid(loss.beta * (r.margin - loss.dpop_lambda * (-r.chosen).relu()))


@dpo_type(reads=("cal_dpo_coef",))
def cal_dpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-(r_w - r_l)) + c sppo_hard, arXiv 2412.14516; no beta in the sigmoid, as in the authors' code."""
    return loss.cal_dpo_coef * sppo_hard(r, loss) - logsigmoid(r.margin)


@dpo_type(reads=("c2_dpo_lambda",))
def c2_dpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-x) + lambda (r_w + r_l)^2, Constrained Controlled DPO, arXiv 2502.17507: what one side gains the other loses.

    Its constraint in logarithms, log p_w + log p_l as by the reference. From two summaries that agree, in lambda too;
    the paper's equation was not seen.
    """
    return loss.c2_dpo_lambda * (r.chosen + r.rejected) ** 2 - logsigmoid(loss.beta * r.margin)


@dpo_type(reads=("irpo_alpha",))
def irpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-x) - alpha log p_w / |y_w|, iterative reasoning preference optimization, arXiv 2404.19733."""
    return loss.irpo_alpha * r.chosen_nll / r.chosen_lengths - logsigmoid(loss.beta * r.margin)


@dpo_type(divergences=True, ignores=("beta", "ld_alpha", "down_sample", "f_divergence_type", "humanline_clip"))
def sft(r: PairRatios, loss: DPOLoss) -> Tensor:
    """-sum log p_w / N_w, N_w the chosen tokens of the step (MPO, arXiv 2411.10442; RPO, 2405.16436).

    TRL divides by the tokens of the micro-batch.
    """
    return r.chosen_nll * (r.totals.num_sequences / max(r.totals.num_chosen_tokens, 1))


@dpo_type(reads=("h_dpo_alpha",))
def h_dpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-beta (alpha (log p_w - log p_l) - (log ref_w - log ref_l))), arXiv 2411.07595: alpha weighs the entropy.

    Derived from beta (-alpha H(p) - E log ref) in the place of beta KL, as oxRL has it; the paper's equation was not
    seen.
    """
    own, reference = r.chosen_logps - r.rejected_logps, r.ref_chosen_logps - r.ref_rejected_logps
    return -logsigmoid(loss.beta * (loss.h_dpo_alpha * own - reference))


@dpo_type(reads=("rejected_weight",))
def dpo_shift(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-beta (r_w - lambda r_l)), DPO-Shift, arXiv 2502.07599, lambda constant (its `fixed` strategy)."""
    return -logsigmoid(loss.beta * (r.chosen - loss.rejected_weight * r.rejected))


@dpo_type(reads=("rejected_weight",))
def bpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-beta min(r_w, -alpha r_l)), Balanced Preference Optimization, arXiv 2506.03557 (not Bregman's, 2505.19601).

    Only the side that is behind learns; at the reference both are, and torch gives each half the slope. As in its
    authors' code, where alpha is 0.3 (`balance_logistic_alpha`); others cite it as the paper's Eq. 5.
    """
    return -logsigmoid(loss.beta * torch.minimum(r.chosen, -loss.rejected_weight * r.rejected))


@dpo_type()
def minor_dpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-beta (r_w - max(0, r_l))), MinorDPO, arXiv 2408.09834: rejected is not pushed below the reference.

    The kink is at r_l = 0, where training begins: there torch's relu has slope 0. From a summary and from oxRL's code;
    the paper's equation was not seen.
    """
    return -logsigmoid(loss.beta * (r.chosen - r.rejected.relu()))
