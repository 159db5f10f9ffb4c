"""Supervised fine-tuning: the negative log-likelihood of the completion, and its reweighted forms.

Differs from TRL 1.16: (1) TRL counts tokens over one gradient-accumulation window, we over the optimizer step, which
is the same thing for equal settings; (2) a row with nothing to score counts for nothing here and is dropped there;
(3) token weights and the z-loss are not in TRL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .options import NotNegative, Variants, variant
from .registry import register
from .token_metrics import TOKEN_METRICS, token_metrics
from .types import CompletionLogps, Kind, Loss, LossOutput, Mean, Totals, divide

SFT_TYPES: Variants[Callable[[Tensor], Tensor]] = Variants()
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
    """L = sum_t w_t (l(log p_t) + c (log Z_t)^2) / sum_t w_t over the whole step; nats, positive for `nll`.

    w: the tokens' weights, 1 where there are none. c (log Z)^2: the z-loss of PaLM (arXiv 2204.02311 Sec. 5).
    """

    kind: ClassVar[Kind] = Kind.SEQUENCE
    metric_stats: ClassVar[tuple[str, ...]] = TOKEN_METRICS  # type: ignore[misc]
    option_tables: ClassVar = {"loss_type": SFT_TYPES}

    loss_type: str = "nll"
    """nll, or dft (Dynamic Fine-Tuning)."""
    z_loss_coef: NotNegative = 0.0
    """Weight of the square of log Z, which keeps logits from drifting (PaLM: 1e-4)."""

    @property
    def stats(self) -> tuple[str, ...]:
        """log Z, for the z-loss."""
        return ("log_z",) if self.z_loss_coef else ()

    def __call__(self, policy: CompletionLogps, *, totals: Totals) -> LossOutput:
        """policy: [C, T]. Raises ValueError or TypeError for shapes and dtypes that do not fit."""
        logps = policy.logps
        per_token_loss = SFT_TYPES[self.loss_type](logps)
        if self.z_loss_coef:
            per_token_loss = per_token_loss + self.z_loss_coef * policy.needed("log_z") ** 2
        if policy.weights is not None:
            per_token_loss = per_token_loss * policy.needed("weights").detach()
        metrics = {"nll": Mean.of(-logps, policy.completion_mask), **token_metrics(policy, predicted=policy)}
        by = totals.num_tokens if totals.sum_weights is None else totals.sum_weights
        return LossOutput(divide(policy.masked(per_token_loss).sum(), by), metrics)
