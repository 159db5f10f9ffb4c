"""From what the loss is given to what a surrogate sees, and the checks of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..divergences import MAX_EXPONENT
from ..types import CompletionLogps, Totals
from .base import GRPO_TYPES, LEVELS, Ratios

if TYPE_CHECKING:
    from ..grpo import GRPOLoss


def check_of_completions(mask: Tensor, **given: Tensor | None) -> None:
    """Raise ValueError for what is not [C]; None is nothing."""
    for name, values in given.items():
        if values is not None and values.shape != mask.shape[:1]:
            raise ValueError(f"{name} must be [{len(mask)}], one a completion, got {list(values.shape)}")


def check_advantages(loss: GRPOLoss, advantages: Tensor, mask: Tensor) -> None:
    """Raise ValueError for advantages of another shape, or of tokens where the loss is of completions."""
    if advantages.shape not in (mask.shape[:1], mask.shape):
        raise ValueError(
            f"advantages must be [{len(mask)}], one a completion, or {list(mask.shape)}, one a token, "
            f"got {list(advantages.shape)}"
        )
    if advantages.ndim == 1:
        return
    if not GRPO_TYPES[loss.loss_type].of_tokens:
        raise ValueError(f"loss_type={loss.loss_type} is of whole completions: advantages must be [{len(mask)}]")
    if loss.importance_sampling_level == "sequence":
        raise ValueError(
            "importance_sampling_level=sequence has one ratio a completion, whose gradient would spread a token's "
            "advantage over all of them: take sequence_token, or advantages of completions"
        )


def check_compared(loss: GRPOLoss, prompts: Tensor | None, totals: Totals) -> None:
    """Raise ValueError where what the loss_type compares with is missing."""
    kind = GRPO_TYPES[loss.loss_type]
    if kind.by_prompt and prompts is None:
        raise ValueError(f"loss_type={loss.loss_type} has one term a prompt: it needs `prompts`, one number for each")
    if kind.collects is not None and totals.collected is None:
        raise ValueError(f"loss_type={loss.loss_type} compares with the whole step: it needs totals.collected")


def ratios_of(
    loss: GRPOLoss,
    policy: CompletionLogps,
    old: CompletionLogps | None,
    advantages: Tensor,
    kept: Tensor | None = None,
    **of_completions: Tensor | None,
) -> Ratios:
    """kept: None: every scored token. of_completions: the fields of `Ratios` that are [C, 1], as [C]."""
    logps, lengths = policy.logps, policy.lengths.clamp(min=1)[:, None]
    log_ratio = logps - (logps if old is None else old.logps).detach()
    ratio = LEVELS[loss.importance_sampling_level](log_ratio, lengths).clamp(max=MAX_EXPONENT).exp()
    advantages = advantages[:, None] if advantages.ndim == 1 else policy.masked(advantages)
    return Ratios(
        ratio,
        log_ratio,
        logps,
        advantages.to(ratio.dtype),
        lengths,
        policy.completion_mask if kept is None else kept,
        **{name: None if values is None else values[:, None] for name, values in of_completions.items()},
    )
