"""By how much chosen is better: the column `margin` of a pair, delta below, a difference of scores.

Its unit is the score's. Where the papers take a function of the scores (the logarithm of their difference, ODPO), that
is for the data to do.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..dpo import DPOLoss
from .base import PairRatios, dpo_type


@dpo_type(margin=True, reads=("odpo_alpha",))
def odpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-(x - alpha delta)), DPO with an offset, arXiv 2402.10571: rewards shall differ by more than it."""
    assert r.given is not None
    return -logsigmoid(loss.beta * r.margin - loss.odpo_alpha * r.given)


@dpo_type(margin=True, reads=("modpo_weight",))
def modpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-(x - (1 - w) delta) / w), arXiv 2310.03708, w = modpo_weight, delta the difference of the other objective's
    reward; of several, the mean by their weights.
    """
    assert r.given is not None
    weight = loss.modpo_weight
    return -logsigmoid((loss.beta * r.margin - (1 - weight) * r.given) / weight)


@dpo_type(margin=True)
def sppo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """(r_w - t)^2 + (r_l + t)^2, t = (P - 1/2) / beta, P = s(delta), arXiv 2405.00675 Eq. 4.7 with soft P.

    P: how probably chosen beats rejected, by a preference model whose scores differ by delta: `sppo_single` of the
    authors' code, whose `sppo` takes each side's mean chance against all answers to the prompt.
    """
    assert r.given is not None
    target = (r.given.sigmoid() - 0.5) / loss.beta
    return (r.chosen - target) ** 2 + (r.rejected + target) ** 2
