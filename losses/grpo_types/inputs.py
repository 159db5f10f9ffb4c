"""From what the loss is given to what a surrogate sees, and the checks of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..divergences import MAX_EXPONENT
from ..types import CompletionLogps, Totals
from .base import GRPO_TYPES, LEVELS, Ratios
from .baseline import without_baseline

if TYPE_CHECKING:
    from ..grpo import GRPOLoss


def check_inputs(
    loss: GRPOLoss,
    policy: CompletionLogps,
    advantages: Tensor,
    *,
    old: CompletionLogps | None,
    behavior: CompletionLogps | None,
    prompts: Tensor | None,
    prompt_tokens: Tensor | None = None,
) -> None:
    """Raise ValueError for shapes that do not fit, or where a prompt's completions are compared, and nobody says which
    are."""
    mask = policy.completion_mask
    check_advantages(loss, advantages, mask)
    for name, values in (("prompts", prompts), ("prompt_tokens", prompt_tokens)):
        if values is not None and values.shape != mask.shape[:1]:
            raise ValueError(f"{name} must be [{len(mask)}], one a completion, got {list(values.shape)}")
    if loss.wants_prompts and prompts is None:
        raise ValueError(f"{compared_by(loss)} compares a prompt's completions: it needs `prompts`, a number for each")
    policy.check_like(tokens=True, old=old, behavior=behavior)


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


def compared_by(loss: GRPOLoss) -> str:
    """What compares with the step, in a message."""
    return "optimal_token_baseline" if loss.optimal_token_baseline else f"loss_type={loss.loss_type}"


def check_compared(loss: GRPOLoss, policy: CompletionLogps, ref: CompletionLogps | None, totals: Totals) -> None:
    """Raise ValueError where the reference or the step that it is compared with is missing, or has other tokens."""
    policy.check_like(tokens=True, ref=ref)
    if loss.wants_reference and ref is None:
        what = f"beta={loss.beta}" if loss.beta > 0 else f"loss_type={loss.loss_type}"
        raise ValueError(f"{what} needs the reference log-probs, ref is None")
    if (loss.optimal_token_baseline or GRPO_TYPES[loss.loss_type].collects) and totals.collected is None:
        raise ValueError(f"{compared_by(loss)} compares with the whole step: it needs totals.collected")


def check_meaning(loss: GRPOLoss) -> None:
    """Raise ValueError for options that mean nothing, alone or together."""
    (low, high), kind = loss.epsilons, GRPO_TYPES[loss.loss_type]
    if low >= kind.widest:
        raise ValueError(f"epsilon={low} must be in [0, 1): no ratio is below 0")
    if loss.loss_type == "cispo" and not high:
        raise ValueError(f"epsilon_high={high} must be positive: cispo multiplies every gradient by it at most")
    if loss.loss_type == "cfpo" and not low:
        raise ValueError(f"epsilon={low} must be positive: cfpo divides by it")
    if loss.off_policy_mask_threshold is not None and kind.by_prompt:
        raise ValueError(f"off_policy_mask_threshold drops completions that {loss.loss_type} compares; leave it out")
    if loss.clip_cov_low >= loss.clip_cov_high:
        raise ValueError(f"clip_cov_low={loss.clip_cov_low} must be below clip_cov_high={loss.clip_cov_high}")
    if loss.optimal_token_baseline:
        check_baseline(loss)


def check_baseline(loss: GRPOLoss) -> None:
    """Raise ValueError for what does not go with advantages of tokens that the loss itself makes."""
    kind, sequence = GRPO_TYPES[loss.loss_type], loss.importance_sampling_level == "sequence"
    if not kind.of_tokens or sequence:
        what = "importance_sampling_level sequence" if sequence else f"loss_type {loss.loss_type}"
        raise ValueError(f"optimal_token_baseline gives each token its advantage, which {what} cannot have")
    if kind.collects is not None or loss.positive_nll_coef:
        what = "positive_nll_coef" if loss.positive_nll_coef else f"loss_type {loss.loss_type}"
        raise ValueError(f"optimal_token_baseline changes the advantages that {what} has counted before; leave one out")


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


def beside_others(
    loss: GRPOLoss, policy: CompletionLogps, x: Ratios, step: Tensor | None, ref: CompletionLogps | None
) -> Ratios:
    """With what the whole step and the reference say."""
    if loss.optimal_token_baseline:
        x = x._replace(advantages=without_baseline(policy, x, step))
    return x._replace(step=step, ref_logps=None if ref is None else ref.logps.detach())
