"""Group Relative Policy Optimization (Shao et al., arXiv 2402.03300) and its variants.

With rho = exp(log p - log p_old) of each token (or, at sequence level, of the mean over the sequence,
arXiv 2507.18071), A the advantage of the completion and d = log p - log p_ref:

    token loss = -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta k3,  k3 = exp(-d) + d - 1
    L = sum over tokens of weight * token loss

A variant is a surrogate (the first term) and a weight (the normaliser), entered by `grpo_type`.

Differs from TRL 1.16: (1) token totals are those of the optimizer step. TRL's dapo divides by the
tokens of the generation batch, which is the same where a generation batch is one step; its bnpo divides by
the tokens of a micro-batch, which would make the result depend on the memory setting: here bnpo's batch is
the step, so it equals dapo. (2) log-ratios above 40 are held there, where TRL overflows to NaN at 88.
As in TRL, k3 is multiplied by rho by default (`use_bias_correction_kl`, arXiv 2512.02556), so that its
gradient is that of the reverse KL also off policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

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
)

MAX_LOG_RATIO = 40.0
"""exp(40) squared is still finite in float32."""

LEVELS = {"token": "a ratio for each token", "sequence": "one for the sequence, the exp of the mean (GSPO)"}


class GRPOType(NamedTuple):
    """surrogate(ratio, advantages [C, 1], loss) -> [C, T] or [C, 1]; weight(policy, totals, loss) -> [C, 1]."""

    surrogate: Callable[[Tensor, Tensor, GRPOLoss], Tensor]
    weight: Callable[[CompletionLogps, Totals, GRPOLoss], Tensor]


GRPO_TYPES: dict[str, GRPOType] = {}


def clipped(ratio: Tensor, advantages: Tensor, loss: GRPOLoss) -> Tensor:
    """-min(rho A, clip(rho) A), arXiv 2402.03300 Eq. 3 (from PPO, 1707.06347 Eq. 7)."""
    low, high = loss.clip_range
    return -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)


def sequence_mean(policy: CompletionLogps, totals: Totals, loss: GRPOLoss) -> Tensor:
    """1 / (B |y_i|): the mean over completions of their token means."""
    return divide(1 / policy.lengths.clamp(min=1)[:, None], totals.num_sequences)


def token_mean(policy: CompletionLogps, totals: Totals, loss: GRPOLoss) -> Tensor:
    """1 / N: every token of the step weighs the same (DAPO, arXiv 2503.14476 Eq. 8)."""
    return divide(torch.ones_like(policy.lengths)[:, None], totals.num_tokens)


def constant_length(policy: CompletionLogps, totals: Totals, loss: GRPOLoss) -> Tensor:
    """1 / (B max_completion_length): no length bias (Dr. GRPO, arXiv 2503.20783)."""
    return divide(torch.ones_like(policy.lengths)[:, None], totals.num_sequences * loss.max_completion_length)


GRPO_TYPES["grpo"] = GRPOType(clipped, sequence_mean)
GRPO_TYPES["dapo"] = GRPOType(clipped, token_mean)
GRPO_TYPES["bnpo"] = GRPOType(clipped, token_mean)
GRPO_TYPES["dr_grpo"] = GRPOType(clipped, constant_length)


@register("grpo")
@dataclass(frozen=True, kw_only=True)
class GRPOLoss(Loss):
    """L = sum_i w_i sum_t l_it, with the weights w_i of the `loss_type`; see the module for l."""

    kind: ClassVar[Kind] = Kind.GROUPED
    uses_reference: ClassVar[bool] = True

    loss_type: str = "dapo"
    """dapo, grpo, dr_grpo, or bnpo."""
    beta: float = 0.0
    """Weight of the KL term to the reference; 0 needs no reference."""
    epsilon: float = 0.2
    """Clip range below 1."""
    epsilon_high: float | None = None
    """Clip range above 1 (default: epsilon)."""
    importance_sampling_level: str = "token"
    """token, or sequence (GSPO)."""
    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the importance ratio."""
    max_completion_length: int = 512
    """Longest completion generated, in tokens; the divisor of dr_grpo."""

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, GRPO_TYPES)
        check_choice("importance_sampling_level", self.importance_sampling_level, LEVELS)
        check_positive("epsilon", self.epsilon)
        if self.epsilon_high is not None:
            check_positive("epsilon_high", self.epsilon_high)
        check_positive("max_completion_length", self.max_completion_length)
        if self.beta < 0:
            raise ValueError(f"beta={self.beta} must not be negative")

    @property
    def wants_reference(self) -> bool:
        """Only for the KL term."""
        return self.beta > 0

    @property
    def clip_range(self) -> tuple[float, float]:
        """(low, high) of the ratio."""
        return 1 - self.epsilon, 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)

    def __call__(
        self,
        policy: CompletionLogps,
        ref: CompletionLogps | None = None,
        *,
        advantages: Tensor,
        old: CompletionLogps | None = None,
        totals: Totals,
    ) -> LossOutput:
        """policy, old, ref: [C, T]; advantages: [C]. Without `old` the batch is on policy (rho = 1).

        Raises ValueError or TypeError for shapes and dtypes that do not fit, or where beta needs a `ref`.
        """
        mask = policy.completion_mask
        if advantages.shape != mask.shape[:1]:
            raise ValueError(f"advantages must be [{len(mask)}], one a completion, got {list(advantages.shape)}")
        policy.check_like(tokens=True, old=old, ref=ref)
        logps = policy.logps
        log_ratio = logps - (logps if old is None else old.logps).detach()
        if self.importance_sampling_level == "sequence":
            log_ratio = log_ratio.sum(-1, keepdim=True) / policy.lengths.clamp(min=1)[:, None]
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        advantages = advantages.to(ratio.dtype)[:, None]
        surrogate, weight = GRPO_TYPES[self.loss_type]
        per_token_loss = surrogate(ratio, advantages, self).expand(mask.shape)

        metrics = self._clip_metrics(ratio, advantages, mask)
        if self.beta > 0:
            if ref is None:
                raise ValueError(f"beta={self.beta} needs the reference log-probs, ref is None")
            d = logps - ref.logps.detach()
            kl = torch.expm1((-d).clamp(max=MAX_LOG_RATIO)) + d
            kl = kl * ratio if self.use_bias_correction_kl else kl
            per_token_loss = per_token_loss + self.beta * kl
            metrics["kl"] = Mean.of(kl, mask)
        if policy.entropy is not None:
            metrics["entropy"] = Mean.of(policy.entropy, mask)
        per_token_loss = torch.where(mask, per_token_loss, per_token_loss.new_zeros(()))
        return LossOutput((weight(policy, totals, self) * per_token_loss).sum(), metrics)

    @torch.no_grad()
    def _clip_metrics(self, ratio: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, Mean]:
        low, high = self.clip_range
        below = ((ratio < low) & (advantages < 0)).expand(mask.shape).to(ratio.dtype)
        above = ((ratio > high) & (advantages > 0)).expand(mask.shape).to(ratio.dtype)
        return {
            "clip_ratio/low_mean": Mean.of(below, mask),
            "clip_ratio/high_mean": Mean.of(above, mask),
            "clip_ratio/region_mean": Mean.of(below + above, mask),
        }
