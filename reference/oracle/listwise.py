"""Lists of completions with a reward each, and a reference model: InfoNCA, NCA, EXO, Plackett-Luce."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from logratio.reference.oracle._math import softplus, zero


def listwise(
    completions: Sequence[Sequence[Tensor]],
    ref_completions: Sequence[Sequence[Tensor]],
    rewards: Sequence[Sequence[float]],
    *,
    beta: float = 0.1,
    temperature_alpha: float = 1.0,
    loss_type: str = "infonca",
) -> Tensor:
    """Mean over lists. One sequence of completions, and one of rewards, for each prompt."""
    total = zero([y for answers in completions for y in answers])
    for answers, refs, graded in zip(completions, ref_completions, rewards, strict=True):
        if not any(len(y) for y in answers):
            continue
        scores = [beta * (y.sum() - ref.detach().sum()) for y, ref in zip(answers, refs, strict=True)]
        total = total + _of_list(loss_type, scores, list(graded), temperature_alpha)
    return total / max(len(completions), 1)


def _of_list(loss_type: str, scores: list[Tensor], rewards: list[float], alpha: float) -> Tensor:
    highest = max(rewards)
    weights = [math.exp((reward - highest) / alpha) for reward in rewards]  # e^(R / alpha), over e^(largest R / alpha)
    q = [weight / math.fsum(weights) for weight in weights]
    log_sum = torch.logsumexp(torch.stack(scores), 0)  # log of sum_j e^(s_j)
    loss = 0 * scores[0]
    if loss_type == "infonca":  # arXiv 2402.05369
        for q_i, s in zip(q, scores, strict=True):
            loss = loss - q_i * (s - log_sum)
    elif loss_type == "nca":  # arXiv 2402.05369: a classifier of each completion
        for q_i, s in zip(q, scores, strict=True):
            loss = loss + q_i * softplus(-s) + softplus(s) / len(scores)
    elif loss_type == "exo_rw":  # arXiv 2402.00856: KL(p || q)
        log_weights = math.log(math.fsum(weights))
        for reward, s in zip(rewards, scores, strict=True):
            log_q = (reward - highest) / alpha - log_weights
            loss = loss + torch.exp(s - log_sum) * (s - log_sum - log_q)
    elif loss_type == "plackett_luce":  # arXiv 2305.18290: the ranking, best first, one choice after the other
        ranking = sorted(range(len(scores)), key=lambda i: -rewards[i])
        for place, i in enumerate(ranking):
            # what is left to choose from; of equals neither is in the other's way
            left = [scores[i]] + [scores[j] for j in ranking[place + 1 :] if rewards[j] < rewards[i]]
            loss = loss - (scores[i] - torch.logsumexp(torch.stack(left), 0))
    else:
        raise ValueError(f"no formula for listwise's loss_type={loss_type!r}")
    return loss
