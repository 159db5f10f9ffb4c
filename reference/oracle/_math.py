"""The few functions of a real number that several formulas share, written so that float64 stays finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_EXPONENT = 700.0  # exp(709.8) is the last float64


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) = -log sigmoid(-x)"""
    return torch.logaddexp(torch.zeros_like(x), x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x), through its logarithm, whose gradient does not overflow."""
    return torch.exp(-softplus(-x))


def relu(x: Tensor) -> Tensor:
    """max(x, 0), of slope 0 at the kink."""
    return x if x > 0 else 0 * x


def smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x): the label is wrong with probability e."""
    return (1 - label_smoothing) * softplus(-x) + label_smoothing * softplus(x)


def kl_estimate(logp: Tensor, ref: Tensor, estimator: str) -> Tensor:
    """Schulman's estimators of KL(pi || ref) of one token drawn from pi, d = log pi - log ref.

    k1 = d (unbiased), k2 = d^2 / 2 (its gradient is unbiased), k3 = e^-d + d - 1 (unbiased and never negative).
    """
    d = logp - ref
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    if estimator == "k3":
        return torch.expm1(-d) + d  # the 1 inside, where it costs no digits
    if estimator == "k3+":  # the number of k3, the slope of k2
        return d * d / 2 + (torch.expm1(-d) + d - d * d / 2).detach()
    if estimator == "abs":
        return d.abs()
    raise ValueError(f"no formula for the KL estimator {estimator!r}")


def token_mean(logps: Sequence[Tensor]) -> Tensor:
    """-sum log p / N over all tokens of the step: the negative log-likelihood of one token."""
    total, tokens = zero(logps), 0
    for sequence in logps:
        for logp in sequence:
            total = total - logp
            tokens += 1
    return total / max(tokens, 1)


def mean(values: Sequence[float]) -> float:
    """Their mean; of equal values exactly that value, whatever the sum is rounded to."""
    return values[0] if min(values) == max(values) else math.fsum(values) / len(values)


def bessel_std(values: Sequence[float]) -> float:
    """The unbiased standard deviation, 0 of a single value."""
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / max(len(values) - 1, 1))


def zero(logps: Sequence[Tensor]) -> Tensor:
    """0 in float64 with a graph to every completion, so that a loss of nothing still has a gradient."""
    total = torch.zeros((), dtype=torch.float64, device=logps[0].device if len(logps) else None)
    for sequence in logps:
        total = total + 0 * sequence.sum()
    return total
