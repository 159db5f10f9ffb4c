"""Pairs of a few tokens by hand, and DPO of them."""

import math
from math import exp

import torch

from logratio.losses import CompletionLogps, DPOLoss, PairLogps, Totals


def sp(x: float) -> float:
    return math.log1p(exp(x))


def sg(x: float) -> float:
    return 1 / (1 + exp(-x))


def row(logps: list[float], stat: list[float] | None = None) -> CompletionLogps:
    """One completion; NaN is a hole in the mask."""
    values = torch.tensor([logps], dtype=torch.float64, requires_grad=True)
    log_sum_p2 = None if stat is None else torch.tensor([stat], dtype=torch.float64)
    return CompletionLogps(values, ~values.detach().isnan(), log_sum_p2=log_sum_p2)


def ratios(r_w: float, r_l: float) -> tuple[PairLogps, PairLogps]:
    """One token each; the reference's log-probs are -1."""
    return PairLogps(row([r_w - 1]), row([r_l - 1])), PairLogps(row([-1.0]), row([-1.0]))


def run(loss: DPOLoss, policy: PairLogps, ref: PairLogps) -> tuple[float, list[float], list[float]]:
    """(value, slopes of the chosen's tokens, of the rejected's) where this is the whole step."""
    value = loss(policy, ref, totals=Totals.of(policy, loss.collect(policy, ref))).loss
    value.backward()
    return value.item(), *(x.per_token_logps.grad.flatten().tolist() for x in (policy.chosen, policy.rejected))
