"""Kahneman-Tversky Optimization (Ethayarajh et al., arXiv 2402.01306): single completions with a thumb up or down.

With r the log-ratio to the reference summed over completion tokens, and z the step's estimate of
KL(policy || reference), Eqs. 7 and 8:

    desirable:    w_d (1 - sigmoid(beta (r - z)))        undesirable:  w_u (1 - sigmoid(beta (z - r)))
    z = max(0, mean over the step of the log-ratios of mismatched completions), without gradient

Differs from TRL 1.16: z is one number for the optimizer step and all processes; TRL's is one a micro-batch.
Differs from the paper: as in TRL, the sum is divided by the number of examples, not of their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .types import (
    CompletionLogps,
    Kind,
    Loss,
    LossOutput,
    Mean,
    Totals,
    check_choice,
    check_positive,
    divide,
    register,
    variant,
)

KTO_TYPES: dict[str, Callable[[Tensor, Tensor, Tensor, KTOLoss], Tensor]] = {}
"""loss_type -> the unweighted loss of each example from (r [C], z scalar, label [C] as +1 or -1), [C]."""


@variant(KTO_TYPES)
def kto(r: Tensor, z: Tensor, sign: Tensor, loss: KTOLoss) -> Tensor:
    """1 - sigmoid(+-beta (r - z)) = sigmoid(-+beta (r - z)), Eq. 7."""
    return (-sign * loss.beta * (r - z)).sigmoid()


@register("kto")
@dataclass(frozen=True, kw_only=True)
class KTOLoss(Loss):
    """L = sum of w(label) l(r, z, label) / B, B the examples of the whole step."""

    kind: ClassVar[Kind] = Kind.LABELED
    uses_reference: ClassVar[bool] = True
    window_pass: ClassVar[Literal["own", "mismatched"] | None] = "mismatched"

    beta: float = 0.1
    """Strength of the pull towards the reference (1 / nats)."""
    loss_type: str = "kto"
    """kto."""
    desirable_weight: float = 1.0
    """Weight of examples labelled True."""
    undesirable_weight: float = 1.0
    """Weight of examples labelled False."""

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, KTO_TYPES)
        check_positive("beta", self.beta)

    def collect(self, policy: CompletionLogps, ref: CompletionLogps) -> Tensor:
        """[C], log-ratios of mismatched completions, for z."""
        policy.check_like(tokens=False, ref=ref)
        return (policy.sums - ref.sums).detach()

    def __call__(self, policy: CompletionLogps, ref: CompletionLogps, label: Tensor, *, totals: Totals) -> LossOutput:
        """policy, ref: [C, T]; label: [C] bool; totals.collected: mismatched log-ratios of the whole step.

        Raises ValueError or TypeError for shapes and dtypes that do not fit, or where `collected` is missing.
        """
        if totals.collected is None or totals.collected.numel() == 0:
            raise ValueError(
                "KTO's KL term needs the log-ratios of mismatched completions in totals.collected; "
                "a step of one example has none, so use at least two examples a step"
            )
        if label.dtype != policy.completion_mask.dtype or label.shape != policy.sums.shape:
            raise ValueError(f"label must be bool [{len(policy.sums)}], got {label.dtype} {list(label.shape)}")
        policy.check_like(tokens=False, ref=ref)
        r = policy.sums - ref.sums.detach()
        kl = totals.collected.detach().to(r).mean().clamp(min=0)
        weight = torch.where(label, r.new_tensor(self.desirable_weight), r.new_tensor(self.undesirable_weight))
        scored = policy.completion_mask.any(-1)
        losses = weight * KTO_TYPES[self.loss_type](r, kl, 2 * label.to(r.dtype) - 1, self)
        rewards = self.beta * r
        metrics = {
            "kl": Mean.of(kl, scored.any()),
            "rewards/chosen": Mean.of(rewards, label & scored),
            "rewards/rejected": Mean.of(rewards, ~label & scored),
            "logps/chosen": Mean.of(policy.sums, label & scored),
            "logps/rejected": Mean.of(policy.sums, ~label & scored),
        }
        return LossOutput(divide(losses.where(scored, r * 0).sum(), totals.num_sequences), metrics)
