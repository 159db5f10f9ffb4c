"""What an evaluation says of the policy: what completions of held-out prompts are worth, how sure that is, and how
often one of several is right.

Of a reward, with K completions of a prompt: `mean@K`, the mean over prompts of their completions' mean, with a 95 %
interval `mean@K_low`, `mean@K_high` that takes prompts for what was drawn: completions of one prompt are alike, so that
more of them make it hardly narrower. Where all values are 0 or 1, `pass@k` too, for k = 1, 2, 4, ... up to K. TRL has
none of these. The interval is of these prompts' like; it says nothing of other seeds of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from logratio.losses import Mean

from ..data.examples import Prompt
from ..processes.dealing import gather_rows
from .generation import numbered
from .intervals import Z, wilson
from .rollouts import Rollouts


def evaluate(rollouts: Rollouts, prompts: Sequence[Prompt], accelerator: Accelerator) -> dict[str, Mean]:
    """Metrics of completions of all prompts, over all processes."""
    rank, world = accelerator.process_index, accelerator.num_processes
    rolled = rollouts(numbered(prompts)[rank::world], "evaluation")
    metrics = rollouts.metrics(rolled, accelerator)
    everyone, _ = gather_rows(accelerator, rolled.by_function)
    for name, values in zip(rollouts.rewards, everyone.unbind(-1), strict=True):
        for figure, value in figures(values).items():
            metrics[f"rewards/{name}/{figure}"] = Mean.of(torch.tensor([value], dtype=torch.float64))
    return metrics


def figures(values: Tensor) -> dict[str, float]:
    """Of one reward's values [prompts, K], float64, NaN where it had no opinion; what cannot be said is left out."""
    known = [[v for v in row if not math.isnan(v)] for row in values.tolist()]
    known = [row for row in known if row]
    if not known:
        return {}
    name = f"mean@{values.shape[1]}"
    right_or_wrong = all(v in (0.0, 1.0) for row in known for v in row)
    means = torch.tensor([sum(row) / len(row) for row in known], dtype=torch.float64)
    found = {name: float(means.mean())}
    if len(means) > 1:
        found[f"{name}_low"], found[f"{name}_high"] = (
            score_interval(means, sum(map(len, known))) if right_or_wrong else normal_interval(means)
        )
    k = 1
    while right_or_wrong and k <= values.shape[1]:
        passes = [pass_at(k, len(row), int(sum(row))) for row in known if len(row) >= k]
        if passes:
            found[f"pass@{k}"] = sum(passes) / len(passes)
        k *= 2
    return found


def normal_interval(means: Tensor) -> tuple[float, float]:
    """m +- z s / sqrt(n), of n >= 2 prompts' means."""
    mean, half = float(means.mean()), Z * float(means.std()) / math.sqrt(len(means))
    return mean - half, mean + half


def score_interval(means: Tensor, completions: int) -> tuple[float, float]:
    """Wilson's, of a share p, which stays within 0 and 1 and has a width at these too.

    In place of the number of trials stands how many independent ones would be as sure, p (1 - p) / (s^2 / n) (Kish's
    effective sample size), with s the standard deviation of n >= 2 prompts' means; where these are all the same, n.
    """
    share, n = float(means.mean()), len(means)
    variance = float(means.var()) / n  # of values that are all the same it rounds to more than 0
    trials = min(share * (1 - share) / variance, completions) if means.min() < means.max() else n
    return wilson(share, trials)


def pass_at(k: int, completions: int, right: int) -> float:
    """1 - C(n - c, k) / C(n, k): that one of k completions is right, unbiased (arXiv 2107.03374 Eq. 1)."""
    return 1 - math.comb(completions - right, k) / math.comb(completions, k)
