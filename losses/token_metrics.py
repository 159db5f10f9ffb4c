"""Metrics that several losses have, under TRL's names."""

from __future__ import annotations

from torch import Tensor

from .metrics import Mean
from .types import CompletionLogps, PairLogps

TOKEN_METRICS = ("entropy", "is_top1")
"""The row statistics that `token_metrics` shows."""


def token_metrics(*scored: CompletionLogps | None, predicted: CompletionLogps | None = None) -> dict[str, Mean]:
    """Means over scored tokens, of the statistics that are there.

    entropy: of the distributions that the tokens of all of `scored` are drawn from, in nats. mean_token_accuracy: how
    often a token of `predicted` is the one that the model finds most likely.
    """
    metrics = {}
    parts = [Mean.of(x.entropy, x.completion_mask) for x in scored if x is not None and x.entropy is not None]
    if parts:
        metrics["entropy"] = Mean(sum(p.total for p in parts), sum(p.count for p in parts))  # type: ignore[arg-type]
    if predicted is not None and predicted.is_top1 is not None:
        metrics["mean_token_accuracy"] = Mean.of(predicted.is_top1, predicted.completion_mask)
    return metrics


def preference_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor, policy: PairLogps) -> dict[str, Mean]:
    """TRL's names: implicit rewards [P] of chosen and rejected, how often and by how much chosen wins, log-probs."""
    values = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": policy.chosen.sums,
        "logps/rejected": policy.rejected.sums,
    }
    scored = policy.scored
    return {name: Mean.of(value, scored) for name, value in values.items()}
