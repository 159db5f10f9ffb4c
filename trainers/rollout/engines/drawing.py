"""From logits to tokens: one uniform number for each completion and position, and the inverse of the distribution.

With F the running sum of the probabilities over the vocabulary, the token is the first v with F(v) > u. So a completion
is decided by its own numbers u alone: rounding that differs from batch to batch moves it only where u is as near to a
step of F as that rounding, about once in a million tokens in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from logratio.losses import Support

from ...errors import UserError
from .protocol import Sampling


def uniforms(seed: int, count: int) -> Tensor:
    """[count] float64 in [0, 1), those of the completion's positions: of Philox with the seed as its key, the same on
    every machine, and the first of them for any count."""
    return torch.from_numpy(numpy.random.Generator(numpy.random.Philox(key=seed)).random(count))


class Draws(NamedTuple):
    """tokens: [R] int64. logps: [R], in nats. kept: [R, V] bool, what could have been drawn; None where that is
    everything, or was not asked for."""

    tokens: Tensor
    logps: Tensor
    kept: Tensor | None


class Drawing:
    """Draws a token for each row, by the options of `sampling`."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.penalty: Any = None
        if sampling.repetition_penalty != 1:
            self.penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        self.cuts = LogitsProcessorList()
        if sampling.top_k:
            self.cuts.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.cuts.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            self.cuts.append(MinPLogitsWarper(sampling.min_p))

    @property
    def wants_history(self) -> bool:
        return self.penalty is not None

    def __call__(self, logits: Tensor, numbers: Tensor, history: Tensor | None = None) -> Draws:
        """Tokens and their log-probabilities.

        logits: [R, V], in at least float32, not yet divided by the temperature. numbers: [R] float64 in [0, 1); NaN for
        a row that is greedy. history: [R, L], ids that rows hold already, repeated as one likes; for the penalty.
        """
        if self.penalty is not None:
            logits = self.penalty(history, logits)
        if self.sampling.temperature != 1:
            logits = logits / self.sampling.temperature
        greedy = numbers.isnan()
        all_greedy = bool(greedy.all())
        kept = logits if all_greedy else self.cuts(history, logits)  # type: ignore[arg-type]
        log_z = kept.logsumexp(-1, keepdim=True)
        if all_greedy:
            tokens = logits.argmax(-1)
        else:
            tokens = inverse((kept - log_z).exp_(), numbers.nan_to_num(0.0))
            if bool(greedy.any()):
                tokens = torch.where(greedy, logits.argmax(-1), tokens)
                log_z = torch.where(greedy[:, None], logits.logsumexp(-1, keepdim=True), log_z)
        logps = logits.gather(-1, tokens[:, None]) - log_z
        keep = self.sampling.keep_support and self.sampling.cut
        return Draws(tokens, logps[:, 0], (kept > -torch.inf) | greedy[:, None] if keep else None)


def inverse(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """[R], of each row the first place where the running sum is above the number's share of the whole.

    probabilities: [R, V], not negative; places of 0 are never found. numbers: [R] float64 in [0, 1).
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    whole = sums[:, -1:]
    # rounding may make the product the whole itself, which no running sum is above
    wanted = torch.minimum(numbers[:, None] * whole, whole.nextafter(torch.zeros_like(whole)))
    # of a row that is not finite none is: its log-probability will say so
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp(max=probabilities.shape[1] - 1)


def support_of_each(kept: Tensor) -> list[Support]:
    """That of each row of kept [R, V] bool, on the CPU."""
    return Support.of(kept).to(torch.device("cpu")).split([1] * len(kept))


def check_finite(logps: Tensor) -> None:
    """Raise UserError where a drawn token's log-probability is not finite."""
    if not bool(logps.isfinite().all()):
        raise UserError(
            "the policy's logits are not finite while completions are sampled: use float32 or bfloat16, a smaller "
            "learning rate, or another checkpoint"
        )
