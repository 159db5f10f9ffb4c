"""GRPO: what is clipped in each variant, and the entropy's quantile over the step."""

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from logratio.losses import CompletionLogps, GRPOLoss, Totals


def logps(rows: list[list[float]], **stats: list[list[float]]) -> CompletionLogps:
    values = torch.tensor(rows, dtype=torch.float64)
    extra = {name: torch.tensor(x, dtype=torch.float64) for name, x in stats.items()}
    return CompletionLogps(values, torch.ones_like(values, dtype=torch.bool), **extra)


def clip_ratios(log_ratios: list[float], advantage: float, **options: Any) -> tuple[float, float]:
    """(low, high), the means over the tokens of one completion."""
    policy, old = logps([[x - 1 for x in log_ratios]]), logps([[-1.0] * len(log_ratios)])
    given = torch.tensor([advantage], dtype=torch.float64)
    metrics = GRPOLoss(**options)(policy, advantages=given, old=old, totals=Totals.of(policy)).metrics
    low, high = (metrics[f"clip_ratio/{name}_mean"] for name in ("low", "high"))
    return (low.total / low.count).item(), (high.total / high.count).item()


@pytest.mark.parametrize(
    ("advantage", "log_ratios", "expected"),
    [
        (-1.0, [-0.45, -0.39], (0.5, 0.0)),  # exp(-0.39) = 0.68 is within [exp(-0.4), exp(0.4)]
        (1.0, [0.39, 0.45], (0.0, 0.5)),  # though it is not within 1 +- 0.4
        (1.0, [-0.45, -0.39], (0.0, 0.0)),
    ],
)
def test_gmpo_clips_the_logarithm(advantage, log_ratios, expected):
    assert clip_ratios(log_ratios, advantage, loss_type="gmpo") == expected


@pytest.mark.parametrize(
    ("advantage", "log_ratios", "expected"),
    [
        (1.0, [0.15, 0.15], (0.0, 1.0)),  # W = exp(0.3) = 1.35, and each ratio is 1.16
        (1.0, [0.3, -0.3], (0.0, 0.0)),
        (-1.0, [-0.15, -0.15], (1.0, 0.0)),
        (-1.0, [0.15, 0.15], (0.0, 0.0)),
    ],
)
def test_rloo_clips_the_whole_sequence(advantage, log_ratios, expected):
    assert clip_ratios(log_ratios, advantage, loss_type="rloo") == expected


def test_the_others_clip_each_ratio():
    assert clip_ratios([log(1.3), log(1.1)], 1.0, loss_type="grpo") == (0.0, 0.5)
    assert clip_ratios([log(1.3), log(1.3)], 1.0, loss_type="grpo", importance_sampling_level="sequence") == (0.0, 1.0)


def bonus(share: float, entropies: list[float]) -> float:
    """The mean entropy of the tokens that are kept."""
    policy = logps([[-1.0] * len(entropies)], entropy=[entropies])
    loss = GRPOLoss(top_entropy_quantile=share, entropy_coef=1.0)
    totals = Totals.of(policy, loss.collect(policy) if loss.window_pass else None)
    return -loss(policy, advantages=torch.zeros(1), totals=totals).loss.item()


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (1.0, [1, 2, 3, 4, 5, 6]),
        (0.9, [2, 3, 4, 5, 6]),
        (0.5, [4, 5, 6]),
        (0.4, [4, 5, 6]),  # the quantile at 0.6 of five steps is the token at 3 itself
        (0.39, [5, 6]),
        (0.2, [5, 6]),
        (0.0, [6]),
    ],
)
def test_a_token_at_the_quantile_is_kept(share: float, kept: list[int]):
    assert bonus(share, [3, 1, 6, 2, 5, 4]) == pytest.approx(sum(kept) / len(kept), rel=1e-12)


def test_a_step_may_have_more_tokens_than_torch_has_quantiles_for():
    policy = logps([[-1.0, -1.0]], entropy=[[0.5, 2.0]])
    everyone: Tensor = torch.zeros(2**24 + 8, 1, dtype=torch.float32)
    everyone[:4, 0] = torch.tensor([0.5, 2.0, 1.0, 3.0])
    loss = GRPOLoss(top_entropy_quantile=2 / (len(everyone) - 1), entropy_coef=1.0)
    totals = Totals(num_sequences=9, num_tokens=len(everyone), collected=everyone)
    value = loss(policy, advantages=torch.zeros(1), totals=totals).loss
    assert value.item() == pytest.approx(-2.0 / 3)  # 1, 2 and 3 are kept in the step, 2 of them here
