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
from torch.nn.functional import pad
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
)

from logratio.losses import Support

from ...errors import UserError
from .protocol import Sampling

BLOCK = 128
LIKELIEST = 1024
"""Tokens that hold `top_p` in most rows."""


def uniforms(seed: int, count: int) -> Tensor:
    """[count] float64 in [0, 1), those of the completion's positions: of Philox with the seed as its key, the same on
    every machine, and the first of them for any count."""
    return torch.from_numpy(numpy.random.Generator(numpy.random.Philox(key=seed)).random(count))


class TopP(LogitsProcessor):
    """The smallest set of likeliest tokens of at least this probability, as transformers' `TopPLogitsWarper` has it but
    for tokens as likely as the last one, which are all kept. It sorts the likeliest alone where these are enough."""

    def __init__(self, top_p: float) -> None:
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(-1)
        least = probabilities.new_zeros(())
        for count in (min(LIKELIEST, scores.shape[1]), scores.shape[1]):
            likeliest = probabilities.topk(count).values
            sums = likeliest.cumsum(-1, dtype=torch.float64)
            taken = (sums - likeliest < self.top_p).sum(-1, keepdim=True)
            least = likeliest.gather(-1, (taken - 1).clamp(min=0))
            if bool((sums[:, -1] >= self.top_p).all()):
                break
        return scores.masked_fill(probabilities < least, -torch.inf)


class Draws(NamedTuple):
    """tokens: [R] int64. logps: [R] float64, in nats. kept: [R, V] bool, what could have been drawn; None where that is
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
            self.cuts.append(TopP(sampling.top_p))
        if sampling.min_p:
            self.cuts.append(MinPLogitsWarper(sampling.min_p))

    @property
    def plain(self) -> bool:
        """Whether nothing is looked at but logits and numbers, and nothing to be told but tokens and logps."""
        return not self.sampling.cut and self.penalty is None

    def __call__(
        self, logits: Tensor, numbers: Tensor, history: Tensor | None = None, *, some_greedy: bool | None = None
    ) -> Draws:
        """Tokens and their log-probabilities.

        logits: [R, V], in at least float32, not yet divided by the temperature. numbers: [R] float64 in [0, 1); NaN for
        a row that is greedy. history: [R, L], ids that rows hold already, repeated as one likes; for the penalty.
        some_greedy: whether there may be such a row, where that is known; else the host waits to see.
        """
        if self.penalty is not None:
            logits = self.penalty(history, logits)
        if self.sampling.temperature != 1:
            logits = logits / self.sampling.temperature
        greedy = numbers.isnan()
        cut = self.sampling.cut
        if some_greedy is None:
            some_greedy = bool(greedy.any())
        kept = self.cuts(history, logits) if cut else logits  # type: ignore[arg-type]
        if cut and some_greedy:
            kept = torch.where(greedy[:, None], logits, kept)
        probabilities = kept.softmax(-1)
        tokens, whole = inverse(probabilities, numbers.nan_to_num(0.0))
        if some_greedy:
            tokens = torch.where(greedy, logits.argmax(-1), tokens)
        # torch's float32 probabilities of 150,000 words may add up to 1.00003: what is drawn is their share of that
        logps = probabilities.gather(-1, tokens[:, None])[:, 0].double().log() - whole.log()
        return Draws(tokens, logps, kept > -torch.inf if cut and self.sampling.keep_support else None)


def inverse(probabilities: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """[R] each, of each row the first place where the running sum is above the number's share of the whole; and the
    whole, in float64.

    probabilities: [R, V], not negative; places of 0 are never found. numbers: [R] float64 in [0, 1). The sum runs over
    blocks of `BLOCK` places, then over those of the block that it ends in: all of them in float64 would take a CPU
    longer than everything else that is done with a row.
    """
    rows, width = probabilities.shape
    if width % BLOCK:
        probabilities = pad(probabilities, (0, -width % BLOCK))
    blocks = probabilities.view(rows, -1, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    block, wanted = first_above(sums, numbers * sums[:, -1])
    before = sums.gather(-1, (block - 1).clamp(min=0)[:, None])[:, 0].masked_fill(block == 0, 0.0)
    inside = blocks[torch.arange(rows, device=block.device), block].cumsum(-1, dtype=torch.float64)
    place, _ = first_above(inside, wanted - before)
    return (block * BLOCK + place).clamp(max=width - 1), sums[:, -1]


def first_above(sums: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """[R] each, of rising sums [R, n]: the first place of a row that is above what is wanted, and that, which rounding
    may have made no less than the last of them. Of a row that is not finite no place is right: it is the last."""
    whole = sums[:, -1]
    wanted = torch.minimum(wanted, whole.nextafter(torch.zeros_like(whole)))
    return torch.searchsorted(sums, wanted[:, None], right=True)[:, 0].clamp(max=sums.shape[1] - 1), wanted


def support_of_each(kept: Tensor) -> list[Support]:
    """That of each row of kept [R, V] bool, on the CPU."""
    return Support.of(kept).to(torch.device("cpu")).split([1] * len(kept))


def check_finite(logps: Tensor) -> None:
    """Raise UserError where a drawn token's log-probability is not finite."""
    if not bool(logps.isfinite().all()):
        raise UserError(
            "the policy's logits are not finite while completions are sampled: take a smaller --learning_rate, another "
            "checkpoint, or another --dtype where it is float16, which overflows where bfloat16 does not"
        )
