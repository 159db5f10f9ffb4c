"""What the log says of a step's rollouts: TRL's metrics, over all processes.

Differs from TRL 1.16: `completions/..._terminated_length` is left out where none ended, and is not 0;
`frac_reward_zero_std` is of groups with every `scale_rewards`. `completions/unscored_ratio`, of completions that no
reward function had an opinion on, is not in TRL, and is left out where it is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from logratio.losses import Mean
from logratio.losses.advantages import differ, sum_then_normalize

from .engines.protocol import Said


def completion_metrics(lengths: Tensor, ended: Tensor) -> dict[str, Mean]:
    """lengths: of the step's completions, in tokens. ended: False where the length limit cut one."""
    metrics = {"completions/clipped_ratio": Mean.of(1 - ended)}
    for name, values in (("", lengths.flatten()), ("_terminated", lengths[ended.bool()])):
        ascending = values.sort().values
        metrics[f"completions/mean{name}_length"] = Mean.of(values)
        metrics[f"completions/min{name}_length"] = Mean.of(ascending[:1])
        metrics[f"completions/max{name}_length"] = Mean.of(ascending[-1:])
    return metrics


def tokens_of(said: Said) -> int:
    """That the model wrote."""
    return sum(len(s.own_logps) for samples in said for s in samples)


def time_metrics(seconds: float, tokens: int) -> dict[str, Mean]:
    """Of a process's rollouts, which took so long: means over processes of their times, and of all their tokens over
    all their times."""
    return {
        "rollout_ms": Mean(torch.tensor(1e3 * seconds), torch.tensor(1.0)),
        "rollout_tokens_per_s": Mean(torch.tensor(float(tokens)), torch.tensor(seconds)),
    }


def reward_metrics(by_function: Tensor, weights: Tensor, names: Sequence[str]) -> dict[str, Mean]:
    """by_function: [prompts, G, K] of the whole step, NaN where a reward function returned None."""
    rewards = sum_then_normalize(by_function, weights)
    known = ~rewards.isnan()
    metrics = {
        **_mean_and_std("reward", "reward_std", rewards),
        "frac_reward_zero_std": Mean.of((~differ(rewards)[:, 0] & (known.sum(1) > 1)).double()),
    }
    if not known.all():
        metrics["completions/unscored_ratio"] = Mean.of((~known).double())
    for column, name in enumerate(names):
        metrics |= _mean_and_std(f"rewards/{name}/mean", f"rewards/{name}/std", by_function[..., column])
    return metrics


def _mean_and_std(mean: str, std: str, values: Tensor) -> dict[str, Mean]:
    """Of what is not NaN; the standard deviation with Bessel's correction, of two or more."""
    known = values[~values.isnan()]
    return {mean: Mean.of(known), std: Mean.of(known.std().view(1) if len(known) > 1 else known[:0])}
