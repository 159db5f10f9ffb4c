"""What the loss of a token is multiplied by: the normalisers, which no surrogate depends on.

B: completions of the step, P: its prompts, N: its scored tokens, |y_i|: those of completion i, N_p: those of all
completions of its prompt. Each is a total over all micro-batches and processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..options import variant
from ..types import Totals, divide
from .base import LOSS_AGGREGATIONS, Ratios

if TYPE_CHECKING:
    from ..grpo import GRPOLoss


@variant(LOSS_AGGREGATIONS)
def token_mean(x: Ratios, totals: Totals, loss: GRPOLoss) -> Tensor:
    """1 / N: every token of the step weighs the same (DAPO, arXiv 2503.14476 Eq. 8)."""
    return divide(torch.ones_like(x.lengths), totals.num_tokens)


@variant(LOSS_AGGREGATIONS)
def sequence_mean(x: Ratios, totals: Totals, loss: GRPOLoss) -> Tensor:
    """1 / (B |y_i|): the mean over completions of their token means."""
    return divide(1 / x.lengths, totals.num_sequences)


@variant(LOSS_AGGREGATIONS)
def sequence_sum(x: Ratios, totals: Totals, loss: GRPOLoss) -> Tensor:
    """1 / B: the mean over completions of their token sums (LUSPO, arXiv 2602.05261)."""
    return divide(torch.ones_like(x.lengths), totals.num_sequences)


@variant(LOSS_AGGREGATIONS)
def constant_length(x: Ratios, totals: Totals, loss: GRPOLoss) -> Tensor:
    """1 / (B max_completion_length): no length bias (Dr. GRPO, arXiv 2503.20783)."""
    return divide(torch.ones_like(x.lengths), totals.num_sequences * loss.max_completion_length)


@variant(LOSS_AGGREGATIONS)
def prompt_mean(x: Ratios, totals: Totals, loss: GRPOLoss) -> Tensor:
    """1 / (P N_p): the mean over prompts of the token mean over all of the prompt's completions.

    DAPO's Eq. 8 as it is written (arXiv 2503.14476), with a sum over one prompt's group and an expectation over
    prompts; ScaleRL's prompt average (arXiv 2510.13786 Sec. 3.2). A prompt with nothing scored counts in P.
    """
    if x.prompt_tokens is None:
        raise ValueError("loss_aggregation=prompt_mean needs prompt_tokens, the scored tokens of each one's prompt")
    return divide(1 / x.prompt_tokens.to(x.lengths).clamp(min=1), totals.num_prompts)
