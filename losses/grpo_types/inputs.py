"""From what the loss is given to what a surrogate sees, and the checks of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..divergences import MAX_EXPONENT
from ..types import CompletionLogps
from .base import GRPO_TYPES, LEVELS, Ratios

if TYPE_CHECKING:
    from ..grpo import GRPOLoss


def check_inputs(
    loss: GRPOLoss,
    policy: CompletionLogps,
    advantages: Tensor,
    of_completions: dict[str, Tensor | None],
    **others: CompletionLogps | None,
) -> None:
    """Raise ValueError for shapes that do not fit, or for advantages of tokens where the loss is of completions."""
    mask = policy.completion_mask
    for name, values in of_completions.items():
        if values is not None and values.shape != mask.shape[:1]:
            raise ValueError(f"{name} must be [{len(mask)}], one a completion, got {list(values.shape)}")
    policy.check_like(tokens=True, **others)
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


def ratios_of(
    loss: GRPOLoss,
    policy: CompletionLogps,
    old: CompletionLogps | None,
    advantages: Tensor,
    prompts: Tensor | None,
    kept: Tensor | None = None,
) -> Ratios:
    """kept: None: every scored token."""
    logps, lengths = policy.logps, policy.lengths.clamp(min=1)[:, None]
    log_ratio = logps - (logps if old is None else old.logps).detach()
    ratio = LEVELS[loss.importance_sampling_level](log_ratio, lengths).clamp(max=MAX_EXPONENT).exp()
    advantages = advantages[:, None] if advantages.ndim == 1 else policy.masked(advantages)
    if prompts is None and GRPO_TYPES[loss.loss_type].by_prompt:
        raise ValueError(f"loss_type={loss.loss_type} has one term a prompt: it needs `prompts`, one number for each")
    return Ratios(
        ratio,
        log_ratio,
        logps,
        advantages.to(ratio.dtype),
        lengths,
        policy.completion_mask if kept is None else kept,
        prompts=None if prompts is None else prompts[:, None],
    )
