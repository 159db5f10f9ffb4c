"""The optimal token baseline by hand."""

from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch

from logratio.losses import CompletionLogps, GRPOLoss, Totals

from ._families import refused

nan = float("nan")
# Of prompt 5 three completions, the last of which has a hole; of prompt 2 one. 1 - 2 p + sum p^2 of each token:
# 1 - 1 + 1/2 = 1/2, and 1 - 1/2 + 1/4 = 3/4
P = [[0.5, 0.25, 0.5], [0.25, nan, nan], [0.25, nan, 0.25], [0.5, 0.5, nan]]
P2 = [[0.5, 0.25, 0.5], [0.25, nan, nan], [0.25, nan, 0.25], [0.5, 0.5, nan]]
PROMPTS = [5, 5, 5, 2]
ADVANTAGES = [3.0, -1.0, 1.0, 2.0]
# W is 1/2, 5/4, 7/4, and 3/4, and 3/4, 3/2: at the first place (3/2 - 3/4 + 3/4) / 2, at the second of two completions
# (15/4 + 3/2) / (11/4)
FIRST, SECOND = 1.5 / 2, 5.25 / 2.75
LEFT = [[3 - FIRST, 3 - SECOND, 3.0], [-1 - FIRST], [1 - FIRST, 1 - SECOND], [2.0, 2.0]]


def given(which: Any = slice(None), advantages: Any = ADVANTAGES) -> tuple[CompletionLogps, dict[str, Any]]:
    """(policy, what else the loss is called with) of these completions."""
    logps, log_p2 = (torch.tensor(x, dtype=torch.float64).log()[which] for x in (P, P2))
    policy = CompletionLogps(logps.clone().requires_grad_(), ~logps.isnan(), log_sum_p2=log_p2.requires_grad_())
    return policy, {
        "advantages": torch.tensor(advantages, dtype=torch.float64)[which],
        "prompts": torch.tensor(PROMPTS)[which],
    }


def slopes(policy: CompletionLogps) -> list[list[float]]:
    """Of scored tokens, times their number in the step."""
    grad = policy.per_token_logps.grad * 8
    return [row[m].tolist() for row, m in zip(grad, policy.completion_mask, strict=True)]


@pytest.mark.parametrize("deal", [[[0, 1, 2, 3]], [[3, 1], [2], [0]]], ids=str)
def test_each_place_has_its_own(deal):
    """On policy the slope of a token is minus its advantage; nothing of it goes through the probabilities."""
    loss, parts = GRPOLoss(optimal_token_baseline=True), [given(which) for which in deal]
    collected = torch.cat([loss.collect(policy, **others) for policy, others in parts])
    assert not collected.requires_grad and len(collected) == 8
    got = {}
    for which, (policy, others) in zip(deal, parts, strict=True):
        loss(policy, **others, totals=Totals(num_sequences=4, num_tokens=8, collected=collected)).loss.backward()
        assert policy.log_sum_p2.grad is None
        got |= dict(zip(which, slopes(policy), strict=True))
    assert [got[i] for i in range(4)] == [pytest.approx([-a for a in row], rel=1e-12) for row in LEFT]


def test_what_a_prompts_completions_have_in_common_is_taken_off():
    """But where a completion is alone."""
    loss = GRPOLoss(optimal_token_baseline=True)
    for shift in (0.0, -7.0):
        policy, others = given(advantages=[a + shift for a in ADVANTAGES])
        loss(policy, **others, totals=Totals.of(policy, loss.collect(policy, **others))).loss.backward()
        alone = {(0, 2), (3, 0), (3, 1)}
        expected = [[-(a + shift * ((i, t) in alone)) for t, a in enumerate(row)] for i, row in enumerate(LEFT)]
        assert slopes(policy) == [pytest.approx(row, rel=1e-12) for row in expected]


def test_of_advantages_of_tokens():
    """The mean of the place, weighted alike: 1, 2, 3 beside 4 and 5."""
    table = [[1.0, 2.0, 3.0], [4.0, nan, nan], [5.0, nan, 6.0], [7.0, 8.0, nan]]
    policy, others = given(advantages=table)
    loss = GRPOLoss(optimal_token_baseline=True)
    loss(policy, **others, totals=Totals.of(policy, loss.collect(policy, **others))).loss.backward()
    first = (0.5 * 1 + 0.75 * 4 + 0.75 * 5) / 2
    second = (1.25 * 2 + 1.5 * 6) / 2.75
    expected = [[1 - first, 2 - second, 3], [4 - first], [5 - first, 6 - second], [7, 8]]
    assert slopes(policy) == [pytest.approx([-a for a in row], rel=1e-12) for row in expected]


def test_certain_tokens_have_no_variance():
    """Nothing weighs anything, nor does what rounding takes off it: the advantages stay."""
    policy, others = given()
    certain = torch.zeros_like(policy.per_token_logps)
    policy = replace(policy, per_token_logps=certain.requires_grad_(), log_sum_p2=torch.full_like(certain, -1e-7))
    loss = GRPOLoss(optimal_token_baseline=True)
    loss(policy, **others, totals=Totals.of(policy, loss.collect(policy, **others))).loss.backward()
    assert [row[0] for row in slopes(policy)] == [-a for a in ADVANTAGES]


def test_the_clip_is_by_what_is_left():
    """Of A = 1, below the baseline, a token of rho = 3/2 is not clipped."""
    policy, others = given(advantages=[1.0, 3.0, 3.0, 0.0])
    old = replace(policy.detach(), per_token_logps=policy.per_token_logps.detach() - log(1.5))
    loss = GRPOLoss(optimal_token_baseline=True)
    loss(policy, **others, old=old, totals=Totals.of(policy, loss.collect(policy, **others))).loss.backward()
    assert slopes(policy)[0][0] == pytest.approx(1.5 * 1.5) and slopes(policy)[1] == [0]  # A - 5/2 = -3/2 and 1/2


def test_beside_the_entropys_quantile():
    """Entropies are collected last."""
    policy, others = given()
    policy = replace(policy, entropy=torch.arange(12.0, dtype=torch.float64).view(4, 3))
    loss = GRPOLoss(optimal_token_baseline=True, top_entropy_quantile=0.5)
    collected = loss.collect(policy, **others)
    assert collected[:, -1].tolist() == [0, 1, 2, 3, 6, 8, 9, 10]
    assert collected[:, 1].tolist() == [1, 2, 3, 1, 1, 2, 1, 2]
    loss(policy, **others, totals=Totals.of(policy, collected)).loss.backward()
    kept = [[0, 0, 0], [0], [1, 1], [1, 1]]
    expected = [[-a * k for a, k in zip(*rows, strict=True)] for rows in zip(LEFT, kept, strict=True)]
    assert slopes(policy) == [pytest.approx(row, rel=1e-12) for row in expected]


def test_what_is_asked_for_and_refused():
    loss = GRPOLoss(optimal_token_baseline=True)
    assert loss.stats == ("entropy", "log_sum_p2") and loss.wants_prompts and loss.window_pass == "own"
    policy, others = given()
    with refused("optimal_token_baseline compares with the whole step: it needs totals.collected"):
        loss(policy, **others, totals=Totals.of(policy))
    with refused("optimal_token_baseline compares a prompt's completions: it needs `prompts`, a number for each"):
        loss.collect(policy, advantages=others["advantages"])
    with refused("optimal_token_baseline collects what it compares: it needs advantages"):
        loss.collect(policy)
    with refused("this loss needs the policy's log_sum_p2 of every token, which is None"):
        loss.collect(replace(policy, log_sum_p2=None), **others)
    gives = "optimal_token_baseline gives each token its advantage, which "
    for options, what in (
        ({"loss_type": "gmpo"}, "loss_type gmpo"),
        ({"loss_type": "real"}, "loss_type real"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level sequence"),
    ):
        with refused(f"{gives}{what} cannot have"):
            GRPOLoss(optimal_token_baseline=True, **options)
    changes = "optimal_token_baseline changes the advantages that "
    for options, what in (
        ({"loss_type": "kl_cov"}, "loss_type kl_cov"),
        ({"positive_nll_coef": 0.1}, "positive_nll_coef"),
    ):
        with refused(f"{changes}{what} has counted before; leave one out"):
            GRPOLoss(optimal_token_baseline=True, **options)
