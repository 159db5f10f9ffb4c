"""Noisy labels: what is known of how often annotators err, or disagree."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..dpo import DPOLoss
from .base import PairRatios, dpo_type


def smoothed(x: Tensor, e: float) -> Tensor:
    """(1 - e) sp(-x) + e sp(x): the cross-entropy of sigmoid(x) with a label that is right with probability 1 - e."""
    return -(1 - e) * logsigmoid(x) - e * logsigmoid(-x)


@dpo_type(reads=("label_smoothing",))
def cdpo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """(1 - e) sp(-x) + e sp(x), conservative DPO (Mitchell, "A note on DPO with noisy preferences", Eq. 3)."""
    return smoothed(loss.beta * r.margin, loss.label_smoothing)


@dpo_type(divergences=True, reads=("label_smoothing",))
def robust(r: PairRatios, loss: DPOLoss) -> Tensor:
    """((1 - e) sp(-x) - e sp(x)) / (1 - 2e), arXiv 2403.00409: unbiased under flipped labels, not bounded below."""
    x, e = loss.beta * r.margin, loss.label_smoothing
    return (e * logsigmoid(-x) - (1 - e) * logsigmoid(x)) / (1 - 2 * e)


@dpo_type(divergences=True, reads=("label_smoothing",))
def exo_pair(r: PairRatios, loss: DPOLoss) -> Tensor:
    """s(x) (log s(x) - log(1 - e)) + s(-x) (log s(-x) - log e), arXiv 2402.00856 Eq. 16: a reverse KL."""
    x, e = loss.beta * r.margin, loss.label_smoothing
    return x.sigmoid() * (logsigmoid(x) - math.log1p(-e)) + (-x).sigmoid() * (logsigmoid(-x) - math.log(e))


@dpo_type(ref_entropy=True, reads=("mallows_phi", "mallows_max_entropy"))
def mallows(r: PairRatios, loss: DPOLoss) -> Tensor:
    """sp(-phi d x), d = -log(H / log V), H the reference's mean entropy of a token, MallowsPO-theta, arXiv 2405.14953.

    Pairs weigh the more, the surer the reference is of what follows: less dispersion. As in its authors' code: over the
    tokens of each completion, then over both; phi without the paper's 2. H / log V is held between 1e-6 and 1.
    """
    assert r.ref_entropy is not None
    share = (r.ref_entropy / loss.mallows_max_entropy).clamp(1e-6, 1)
    return -logsigmoid(-loss.mallows_phi * share.log() * loss.beta * r.margin)
