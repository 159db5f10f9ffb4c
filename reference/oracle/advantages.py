"""From rewards to advantages. Rewards come one list a group (the completions of one prompt), and go back so.

None stands for a completion that nothing could score: it is left out of every mean, and its advantage is 0. Every
standard deviation has Bessel's correction, 0 of a single value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from logratio.reference.oracle._math import bessel_std, kl_estimate, mean

Rewards = Sequence[Sequence[float | None]]
EPS = 1e-4


def advantages(rewards: Rewards, scale: str = "group") -> list[list[float]]:
    """(R - mean of its group) / (std + 1e-4), arXiv 2402.03300 Sec. 4.1.2.

    scale: "group" divides by the group's standard deviation, "batch" by that of all rewards (arXiv 2508.08221);
    "none" does not divide (arXiv 2503.20783).
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"no formula for scale={scale!r}")
    everything = [reward for group in rewards for reward in group if reward is not None]
    result = []
    for group in rewards:
        scored = [reward for reward in group if reward is not None]
        divisor = 1.0
        if scale != "none" and scored:
            divisor = bessel_std(scored if scale == "group" else everything) + EPS
        result.append([0.0 if reward is None else (reward - mean(scored)) / divisor for reward in group])
    return result


def total_rewards(by_function: Sequence[Rewards], weights: Sequence[float] | None = None) -> list[list[float | None]]:
    """sum_k w_k R_k of every completion, by_function[k] the rewards of function k; None only where all are None."""
    weights = [1.0] * len(by_function) if weights is None else weights
    result: list[list[float | None]] = []
    for g, group in enumerate(by_function[0]):
        result.append([])
        for i in range(len(group)):
            terms = []
            for weight, rewards in zip(weights, by_function, strict=True):
                reward = rewards[g][i]
                if reward is not None:
                    terms.append(weight * reward)
            result[g].append(math.fsum(terms) if terms else None)
    return result


def normalize_then_sum(by_function: Sequence[Rewards], weights: Sequence[float] | None = None) -> list[list[float]]:
    """sum_k w_k (R_k - m_k) / (std_k + 1e-4) by groups, then whitened over the step: arXiv 2601.05242."""
    normal: list[Rewards] = []
    for rewards in by_function:
        scaled = advantages(rewards)
        normal.append(
            [
                [None if reward is None else value for reward, value in zip(group, values, strict=True)]
                for group, values in zip(rewards, scaled, strict=True)
            ]
        )
    return whiten(total_rewards(normal, weights))


def rloo(rewards: Rewards) -> list[list[float]]:
    """R - mean of the others of its group, arXiv 2402.14740; 0 for one that has no others."""
    result = []
    for group in rewards:
        row = []
        for i, reward in enumerate(group):
            others = [other for j, other in enumerate(group) if j != i and other is not None]
            row.append(0.0 if reward is None or not others else reward - mean(others))
        result.append(row)
    return result


def reinforce_pp(rewards: Rewards) -> list[list[float]]:
    """The rewards whitened over the step, groups ignored: REINFORCE++, arXiv 2501.03262."""
    return whiten(rewards)


def reinforce_pp_baseline(rewards: Rewards) -> list[list[float]]:
    """R - mean of its group, then whitened over the step: REINFORCE++-baseline, arXiv 2501.03262."""
    centred = advantages(rewards, "none")
    return whiten(
        [
            [None if reward is None else value for reward, value in zip(group, values, strict=True)]
            for group, values in zip(rewards, centred, strict=True)
        ]
    )


def remax(rewards: Rewards, greedy: Sequence[float]) -> list[list[float]]:
    """R - R of the greedy answer to the same prompt: arXiv 2310.10505. greedy: one a group."""
    return [
        [0.0 if reward is None else reward - baseline for reward in group]
        for group, baseline in zip(rewards, greedy, strict=True)
    ]


def opo(rewards: Rewards, lengths: Sequence[Sequence[int]]) -> list[list[float]]:
    """R - sum |y| R / sum |y| over its group: arXiv 2505.23585. 0 where no completion has a token."""
    result = []
    for group, counts in zip(rewards, lengths, strict=True):
        scored = [(reward, count) for reward, count in zip(group, counts, strict=True) if reward is not None]
        tokens = sum(count for _, count in scored)
        if tokens and min(scored)[0] == max(scored)[0]:
            baseline = scored[0][0]  # equal rewards: exactly that reward, whatever the sums are rounded to
        elif tokens:
            baseline = math.fsum(reward * count for reward, count in scored) / tokens
        result.append([0.0 if reward is None or not tokens else reward - baseline for reward in group])
    return result


def whiten(values: Rewards) -> list[list[float]]:
    """(A - mean) / (std + 1e-4), both over the step: `normalize_advantages`."""
    everything = [value for group in values for value in group if value is not None]
    if not everything:
        return [[0.0] * len(group) for group in values]
    centre, divisor = mean(everything), bessel_std(everything) + EPS
    return [[0.0 if value is None else (value - centre) / divisor for value in group] for group in values]


def penalized(
    rewards: Sequence[float], old: Sequence[Tensor], ref: Sequence[Tensor], coef: float, estimator: str = "k1"
) -> list[float]:
    """R - coef sum_t KL_t of the policy that sampled against the reference, one reward a completion."""
    return [
        reward - coef * math.fsum(float(kl_estimate(a, b, estimator)) for a, b in zip(y, y_ref, strict=True))
        for reward, y, y_ref in zip(rewards, old, ref, strict=True)
    ]


def rloo_std(rewards: Rewards) -> list[list[float]]:
    """Leave-one-out over (the standard deviation of the whole group + 1e-4)."""
    result = []
    for group, row in zip(rewards, rloo(rewards), strict=True):
        scored = [reward for reward in group if reward is not None]
        result.append([value / (bessel_std(scored) + EPS) if scored else 0.0 for value in row])
    return result


def maxrl(rewards: Rewards) -> list[list[float]]:
    """(R - mean) / mean of its group, arXiv 2602.02710; 0 where the mean is 0, or the reward has nothing beside it."""
    result = []
    for group in rewards:
        scored = [reward for reward in group if reward is not None]
        centre = mean(scored) if len(scored) > 1 else 0.0
        result.append([0.0 if reward is None or not centre else (reward - centre) / centre for reward in group])
    return result


def passk(rewards: Rewards) -> list[list[float]]:
    """The group's best reward less the best without this completion, arXiv 2503.19595 with k = G."""
    result = []
    for group in rewards:
        row = []
        for i, reward in enumerate(group):
            others = [other for j, other in enumerate(group) if j != i and other is not None]
            row.append(0.0 if reward is None or not others else max([reward, *others]) - max(others))
        result.append(row)
    return result


def gpg(rewards: Rewards) -> list[list[float]]:
    """alpha (R - mean of its group), alpha = groups / groups of rewards that differ: arXiv 2504.02546, F_norm = 1."""
    live = sum(1 for group in rewards if len({reward for reward in group if reward is not None}) > 1)
    return [[len(rewards) / max(live, 1) * value for value in row] for row in advantages(rewards, "none")]


def reinforce_pp_tokens(rewards: Rewards, lengths: Sequence[Sequence[int]]) -> list[list[float]]:
    """Whitened over the tokens of the step, each of which has its completion's reward: REINFORCE++, 2501.03262."""
    tokens = [
        reward
        for group, counts in zip(rewards, lengths, strict=True)
        for reward, count in zip(group, counts, strict=True)
        if reward is not None
        for _ in range(count)
    ]
    if len(tokens) < 2:
        return [[0.0] * len(group) for group in rewards]
    centre, divisor = mean(tokens), bessel_std(tokens) + EPS
    return [[0.0 if reward is None else (reward - centre) / divisor for reward in group] for group in rewards]
