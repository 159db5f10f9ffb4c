"""Other functions of the margin than the logistic loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..dpo import MAX_EXPONENT, DPOLoss, PairRatios, dpo_type


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
