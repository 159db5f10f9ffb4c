"""Other functions of the margin than the logistic loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..divergences import MAX_EXPONENT
from ..dpo import DPOLoss
from .base import PairRatios, dpo_type


@dpo_type(divergences=True, reads=("discopop_tau",))
def discopop(r: PairRatios, loss: DPOLoss) -> Tensor:
    """(1 - m) sp(-x) + m exp(-x), m = s(x / tau), arXiv 2406.08414 Eq. 5, with m exp(-x) as one exponential.

    At tau = 0.05 it increases for x in (-0.12, 0.07): at the reference the gradient has the wrong sign, as published.
    """
    x = loss.beta * r.margin
    blend = x / loss.discopop_tau
    return (logsigmoid(blend) - x).clamp(max=MAX_EXPONENT).exp() - (-blend).sigmoid() * logsigmoid(x)


@dpo_type(reads=("chi_po_r_max",))
def chi_po(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-clip(beta (f(r_w) - f(r_l)), +-2 R_max)), f(r) = exp(r) + r, chi-squared PO, arXiv 2407.13399."""
    chosen, rejected = (value.clamp(max=MAX_EXPONENT).exp() + value for value in (r.chosen, r.rejected))
    limit = 2 * loss.chi_po_r_max
    return -logsigmoid((loss.beta * (chosen - rejected)).clamp(-limit, limit))


@dpo_type()
def cauchy(r: PairRatios, loss: DPOLoss) -> Tensor:
    """-log(1/2 + atan(x) / pi), RainbowPO, arXiv 2410.04203: the Cauchy distribution in the logistic one's place.

    Grows with log(-x) only where a pair is ranked wrongly. Both tails are computed as what they fall short of.
    """
    x = loss.beta * r.margin
    right, wrong = (torch.atan2(torch.ones_like(x), side) / math.pi for side in (-x, x))  # right + wrong = 1
    return torch.where(x > 0, -torch.log1p(-wrong), -right.log())


@dpo_type(divergences=True, reads=("sba_lambda",))
def sba(r: PairRatios, loss: DPOLoss) -> Tensor:
    """(exp(-(l + 1) x) / (l + 1) - (exp(l x) - 1) / l) / 4, scaled Basu's power divergence, arXiv 2505.19601 Table 2.

    Bregman preference optimization, R = exp(-x) matched to the odds that the label is wrong; s = 4, where the slope at
    the reference is DPO's. Plus 1 / (4 l), so that l = 0 is the limit, (exp(-x) - x) / 4. The slope in x is
    -(R^(l + 1) + R^-l) / 4: for pairs far ahead it fades where l < 0 and grows where l > 0.
    """
    x, power = loss.beta * r.margin, loss.sba_lambda
    behind = (-(power + 1) * x).clamp(max=MAX_EXPONENT).exp() / (power + 1)
    ahead = torch.expm1((power * x).clamp(max=MAX_EXPONENT)) / power if power else x
    return (behind - ahead) / 4


@dpo_type(reads=("focal_po_gamma",))
def focal_po(r: PairRatios, loss: DPOLoss) -> Tensor:
    """s(x)^gamma sp(-x), FocalPO, arXiv 2501.06645: the focal loss turned round, wrongly ranked pairs weigh less.

    The factor has a gradient, which turns the loss's round where sp(-x) > 1 / gamma. From three summaries that agree:
    the paper's equation was not seen, its authors' repository has no code, and oxRL's stops the factor's gradient.
    """
    nll = -logsigmoid(loss.beta * r.margin)
    return (-loss.focal_po_gamma * nll).exp() * nll
