"""What is done to tokens before their log-ratios are summed: tails weighed, tokens left out, ratios clipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .types import CompletionLogps


def shared_sums(sides: Sequence[CompletionLogps], ld_alpha: float | None) -> list[Tensor]:
    """[P] each, the summed log-probs; `ld_alpha` weighs what is longer than the other side (arXiv 2409.06411)."""
    if ld_alpha is None:
        return [x.sums for x in sides]
    shared = torch.minimum(*(x.lengths for x in sides))[:, None]
    return [torch.where(x.completion_mask.cumsum(-1) > shared, ld_alpha * x.logps, x.logps).sum(-1) for x in sides]


def down_sampled(sides: Sequence[CompletionLogps]) -> list[CompletionLogps]:
    """Both with as many scored tokens as the shorter: of the longer those at even distances, its last among them.

    SamPO, arXiv 2406.10957 Eq. 10, draws them; here they are the same ones each time, however a step is cut.
    """
    fewer = torch.minimum(*(x.completion_mask.sum(-1) for x in sides))[:, None]
    kept = []
    for x in sides:
        place, count = x.completion_mask.cumsum(-1), x.completion_mask.sum(-1, keepdim=True).clamp(min=1)
        drawn = place * fewer // count > (place - 1) * fewer // count
        kept.append(replace(x, completion_mask=x.completion_mask & drawn))
    return kept


def clipped(policy: CompletionLogps, ref: CompletionLogps, within: tuple[float, float]) -> CompletionLogps:
    """The policy with each token's log-ratio to the reference clipped, without gradient where it is (arXiv 2509.24207).

    ValueError where the reference has other tokens.
    """
    policy.check_like(tokens=True, ref=ref)
    base = ref.logps.detach()
    ratio = policy.logps - base
    bounded = ratio.clamp(*within)
    return replace(policy, per_token_logps=torch.where(bounded == ratio, policy.logps, base + bounded))


def mean_entropy(ref: Sequence[CompletionLogps]) -> Tensor:
    """[P] nats without gradient, the mean of the two sides' means over tokens, or that of the one that has tokens.

    ValueError where the reference has no entropy.
    """
    if any(x.entropy is None for x in ref):
        raise ValueError("this loss needs the reference's entropy of every token, which is None")
    means = [x.needed("entropy").sum(-1) / x.lengths.clamp(min=1) for x in ref]
    sides = torch.stack([x.completion_mask.any(-1) for x in ref]).sum(0)
    return torch.stack(means).sum(0).detach() / sides.clamp(min=1)


def check_clip(within: tuple[float, float] | None) -> None:
    """ValueError unless the two numbers lie around 0."""
    if within is not None and not (len(within) == 2 and within[0] <= 0 <= within[1] and within[0] < within[1]):
        raise ValueError(f"humanline_clip={within} must be two numbers around 0, as -1 1.5")


def probability(completion: CompletionLogps) -> Tensor:
    """[P] without gradient, exp of the mean over tokens of log p - log sum_v p_v^2: WPO, arXiv 2406.11827 Eq. 2.

    Not capped at 1, as in TRL (the authors' code caps the product of the two).
    """
    aligned = completion.logps - completion.needed("log_sum_p2")
    return (aligned.sum(-1) / completion.lengths.clamp(min=1)).detach().exp()
