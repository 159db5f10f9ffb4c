"""Supervised fine-tuning: the negative log-likelihood of the completion, and its reweighted form.

Differs from TRL 1.16: (1) TRL counts tokens over one gradient-accumulation window, we over the optimizer
step, which is the same thing for equal settings; (2) a row with nothing to score counts for nothing here
and is dropped there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .types import CompletionLogps, Kind, Loss, LossOutput, Mean, Totals, check_choice, divide, register, variant

SFT_TYPES: dict[str, Callable[[Tensor], Tensor]] = {}
"""loss_type -> the loss of each token given its log-probability, [C, T] -> [C, T]."""


@variant(SFT_TYPES)
def nll(logps: Tensor) -> Tensor:
    """-log p"""
    return -logps


@variant(SFT_TYPES)
def dft(logps: Tensor) -> Tensor:
    """-sg(p) log p, Dynamic Fine-Tuning (arXiv 2508.05629); its gradient is that of -p."""
    return -logps.detach().exp() * logps


@register("sft")
@dataclass(frozen=True, kw_only=True)
class SFTLoss(Loss):
    """L = sum_t l(log p_t) / N, N the scored tokens of the whole step; nats, positive for `nll`."""

    kind: ClassVar[Kind] = Kind.SEQUENCE

    loss_type: str = "nll"
    """nll, or dft (Dynamic Fine-Tuning)."""

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, SFT_TYPES)

    def __call__(self, policy: CompletionLogps, *, totals: Totals) -> LossOutput:
        """policy: [C, T]. Raises ValueError or TypeError for shapes and dtypes that do not fit."""
        logps = policy.logps
        per_token_loss = SFT_TYPES[self.loss_type](logps)
        metrics = {"nll": Mean.of(-logps, policy.completion_mask)}
        if policy.entropy is not None:
            metrics["entropy"] = Mean.of(policy.entropy, policy.completion_mask)
        return LossOutput(
            divide(torch.where(policy.completion_mask, per_token_loss, 0.0).sum(), totals.num_tokens), metrics
        )
