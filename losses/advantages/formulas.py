"""The advantages of completions, one function each; see the package for what R, m, std and eps are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Context, advantage
from .statistics import EPS, GROUP, SCALES, STEP, differ, mean_of, minus, normalize, std_of


@advantage()
def group(rewards: Tensor, context: Context) -> Tensor:
    """A = (R - m) / (std + eps), GRPO (arXiv 2402.03300).

    scale "none": R - m, Dr. GRPO (arXiv 2503.20783). "batch": std is of all rewards of the step (arXiv 2508.08221),
    which holds the differences between prompts too.
    """
    return minus(rewards, mean_of(rewards, GROUP), GROUP) / SCALES[context.scale](rewards)


@advantage()
def rloo(rewards: Tensor, context: Context) -> Tensor:
    """A = R - mean of the others = G / (G - 1) (R - m), REINFORCE leave-one-out (arXiv 2402.14740)."""
    known = (~rewards.isnan()).sum(1, keepdim=True)
    others = (rewards.nansum(1, keepdim=True) - rewards) / (known - 1)
    return minus(rewards, others, GROUP)


@advantage()
def rloo_std(rewards: Tensor, context: Context) -> Tensor:
    """A = (R - mean of the others) / (std + eps), std of the whole group: G / (G - 1) times that of `group`.

    Reading: NeMo-RL leaves the completion out of the std, too, which is 0 where all others are equal: a lone success
    has no finite advantage then.
    """
    return rloo(rewards, context) / (std_of(rewards, GROUP) + EPS)


@advantage()
def maxrl(rewards: Tensor, context: Context) -> Tensor:
    """A = (R - m) / m, m the mean of the group: of binary rewards the gradient of log p(right) to the order G - 1.

    MaxRL, arXiv 2602.02710. 0 where none is right. Raises ValueError for negative rewards, of which m says nothing.
    """
    if (rewards < 0).any():
        raise ValueError(f"maxrl divides by the mean reward: none may be negative, got {rewards.nan_to_num().min():g}")
    mean = mean_of(rewards, GROUP)
    return minus(rewards, mean, GROUP) / mean.where(mean > 0, math.inf)


@advantage()
def passk(rewards: Tensor, context: Context) -> Tensor:
    """A = max R - max of the others: what the group's best loses without this one (arXiv 2503.19595, at k = G).

    0 for all but the best, and for that where another is as good. As in verl's grpo_passk before its std.
    """
    known = rewards.nan_to_num(-torch.inf)
    best = known.topk(min(2, known.shape[1]), 1).values
    others = torch.where(known == best[:, :1], best[:, -1:], best[:, :1])
    return best[:, :1] - others + minus(rewards, rewards, GROUP)  # 0, and NaN where nothing can be compared


@advantage()
def gpg(rewards: Tensor, context: Context) -> Tensor:
    """A = alpha (R - m), alpha = groups of the step / those whose rewards differ, GPG (arXiv 2504.02546) at F_norm = 1.

    Reading: of its B samples M have no gradient, those of groups whose rewards are all equal (or unknown). verl's gpg
    counts the rewards that are not 0 in their stead.
    """
    return len(rewards) / differ(rewards).sum().clamp(min=1) * minus(rewards, mean_of(rewards, GROUP), GROUP)


@advantage(smallest_group=1, whitened=True)
def reinforce_pp_tokens(rewards: Tensor, context: Context) -> Tensor:
    """A = (R - mean) / (std + eps), mean and std over the tokens of the step, each with its completion's reward:
    REINFORCE++ as its paper has it (arXiv 2501.03262); std with Bessel's correction of tokens, as in verl."""
    if context.lengths is None:
        raise ValueError("reinforce_pp_tokens counts tokens: give `lengths` [groups, G]")
    known = ~rewards.isnan()
    tokens = context.lengths.double() * known
    count = tokens.sum()
    centred = rewards - (tokens * rewards).nansum() / count
    std = ((tokens * centred.square()).nansum() / (count - 1)).sqrt()
    some = (tokens > 0) & (count > 1)  # one without a token has nothing to learn
    return torch.where(known, torch.where(some & differ(rewards, STEP), centred / (std + EPS), 0.0), torch.nan)


@advantage(smallest_group=1, whitened=True)
def reinforce_pp(rewards: Tensor, context: Context) -> Tensor:
    """A = (R - mean) / (std + eps) over all of the step, REINFORCE++ (arXiv 2501.03262)."""
    return normalize(rewards)


@advantage(whitened=True)
def reinforce_pp_baseline(rewards: Tensor, context: Context) -> Tensor:
    """R - m, whitened over the step: REINFORCE++-baseline (arXiv 2501.03262); std is of the centred rewards."""
    return normalize(minus(rewards, mean_of(rewards, GROUP), GROUP))


@advantage(smallest_group=1, wants_greedy=True)
def remax(rewards: Tensor, context: Context) -> Tensor:
    """A = R - R(greedy answer), ReMax (arXiv 2310.10505). 0 where there is no reward of the greedy answer."""
    if context.baseline is None:
        raise ValueError("remax compares with the reward of a greedy completion: give `baseline` [groups, 1]")
    return rewards - context.baseline


@advantage()
def opo(rewards: Tensor, context: Context) -> Tensor:
    """A = R - sum(|y| R) / sum(|y|), |y| a completion's tokens: the baseline of least variance (arXiv 2505.23585)."""
    if context.lengths is None:
        raise ValueError("opo weighs rewards by the completions' lengths: give `lengths` [groups, G]")
    lengths = context.lengths.double().masked_fill(rewards.isnan(), 0.0)
    return minus(rewards, (lengths * rewards).nansum(1, keepdim=True) / lengths.sum(1, keepdim=True), GROUP)
