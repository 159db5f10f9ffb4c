"""ORPO: numbers by hand, and odds at their edges."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logratio.losses import CompletionLogps, ORPOLoss, PairLogps, Totals
from logratio.losses.orpo import log_odds
from logratio.reference.strategies import batches

averages = st.floats(-50, -1e-6)
LN2 = math.log(2)


def side(logps: list[list[float]], mask: list[list[int]] | None = None) -> CompletionLogps:
    values = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    return CompletionLogps(values, torch.ones_like(values).bool() if mask is None else torch.tensor(mask).bool())


def test_by_hand():
    """Chosen 2 and 4 bits: average probability 1/8, odds 1/7; rejected 1 bit: odds 1; prompt 3 bits, half scored."""
    chosen, rejected = side([[-2 * LN2, -4 * LN2]]), side([[-LN2]])
    policy = PairLogps(chosen, rejected, side([[-99.0, -3 * LN2]], [[0, 1]]))
    loss, metrics = ORPOLoss(beta=0.5)(policy, totals=Totals.of(policy))
    odds_loss = math.log(8)  # log(1 + odds_l / odds_w)
    assert loss.item() == pytest.approx(9 * LN2 / 3 + 0.5 * odds_loss, rel=1e-12)
    loss.backward()
    # d log odds / d a = 1 / (1 - P); sigmoid(-ratio) = 7/8
    slope = 0.5 * 7 / 8
    expected = [-1 / 3 - slope / (1 - 1 / 8) / 2] * 2
    assert chosen.per_token_logps.grad[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert rejected.per_token_logps.grad[0].tolist() == pytest.approx([slope / (1 - 1 / 2)], rel=1e-12)
    assert policy.prompt.per_token_logps.grad[0].tolist() == pytest.approx([0, -1 / 3], rel=1e-12)
    means = {name: (mean.total.item(), mean.count.item()) for name, mean in metrics.items()}
    assert means == {
        "rewards/chosen": (pytest.approx(-1.5 * LN2), 1),
        "rewards/rejected": (pytest.approx(-0.5 * LN2), 1),
        "rewards/accuracies": (0.0, 1),
        "rewards/margins": (pytest.approx(-LN2), 1),
        "logps/chosen": (pytest.approx(-3 * LN2), 1),
        "logps/rejected": (pytest.approx(-LN2), 1),
        "nll_loss": (pytest.approx(9 * LN2), 3),
        "log_odds_chosen": (pytest.approx(math.log(1 / 7)), 1),
        "log_odds_ratio": (pytest.approx(-math.log(8)), 1),
    }


def test_without_a_prompt_the_nll_is_the_chosen_completions():
    policy = PairLogps(side([[-2 * LN2, -4 * LN2]]), side([[-LN2]]))
    loss = ORPOLoss(beta=1e-9)(policy, totals=Totals.of(policy)).loss
    assert loss.item() == pytest.approx(3 * LN2)


def test_each_term_has_its_own_divisor():
    policy = PairLogps(side([[-2 * LN2, -4 * LN2]]), side([[-LN2]]))
    totals = Totals(num_sequences=5, num_tokens=10**9, num_chosen_tokens=30, num_prompt_tokens=10)
    loss = ORPOLoss(beta=0.5)(policy, totals=totals).loss
    assert loss.item() == pytest.approx(6 * LN2 / 40 + 0.5 * math.log(8) / 5, rel=1e-12)


def test_pairs_of_different_lengths_and_one_that_scores_nothing():
    """Three pairs of a step of six: chosen 2 and 4 bits against 1 bit, an empty chosen against 1 bit, nothing."""
    nan = math.nan
    chosen, rejected = (
        torch.tensor(rows, dtype=torch.float64).requires_grad_()
        for rows in ([[-2 * LN2, nan, -4 * LN2], [nan] * 3, [nan] * 3], [[-LN2], [-LN2], [nan]])
    )
    policy = PairLogps(*(CompletionLogps(x, ~x.detach().isnan()) for x in (chosen, rejected)))
    totals = Totals(num_sequences=6, num_tokens=99, num_chosen_tokens=8)
    loss, metrics = ORPOLoss(beta=0.5)(policy, totals=totals)
    certain = -math.log(2**-52)  # log odds of an average of 0, held at the smallest number
    assert loss.item() == pytest.approx(6 * LN2 / 8 + 0.5 * (math.log(8) + math.log1p(math.exp(-certain))) / 6)
    loss.backward()
    slope = 0.5 * 7 / 8 / 6
    assert chosen.grad[0].tolist() == pytest.approx([-1 / 8 - slope / (7 / 8) / 2, 0, -1 / 8 - slope / (7 / 8) / 2])
    assert rejected.grad[0].item() == pytest.approx(slope / (1 / 2))
    assert (chosen.grad[1:] == 0).all() and rejected.grad[2] == 0 < rejected.grad[1]
    assert {mean.count.item() for mean in metrics.values()} == {2}
    assert metrics["rewards/rejected"].total.item() == pytest.approx(-LN2)
    assert metrics["log_odds_ratio"].total.item() == pytest.approx(-math.log(8))
    assert metrics["nll_loss"].total.item() == pytest.approx(6 * LN2)


def test_options_of_orpo():
    loss = ORPOLoss()
    assert dataclasses.asdict(loss) == {"beta": 0.1} and loss.scores_prompt
    assert not loss.wants_reference and not loss.scores_gold and loss.window_pass is None
    with pytest.raises(ValueError, match="beta=0 must be positive$"):
        ORPOLoss(beta=0)


def odds_term(chosen: float, rejected: float) -> float:
    policy = PairLogps(side([[chosen]]), side([[rejected]]))
    totals = Totals(num_sequences=1, num_tokens=0)  # no chosen tokens counted: the NLL is left out
    return ORPOLoss(beta=1.0)(policy, totals=totals).loss.item()


@settings(max_examples=50, deadline=None)
@given(averages, averages)
def test_odds_term_is_log_one_plus_the_ratio_of_odds(chosen, rejected):
    log_ratio = (rejected - math.log(-math.expm1(rejected))) - (chosen - math.log(-math.expm1(chosen)))
    expected = max(log_ratio, 0) + math.log1p(math.exp(-abs(log_ratio)))
    assert odds_term(chosen, rejected) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(averages, averages)
def test_swapping_changes_the_odds_term_by_the_log_odds_ratio(chosen, rejected):
    ratio = math.log(-math.expm1(rejected)) - math.log(-math.expm1(chosen)) + chosen - rejected
    assert odds_term(chosen, rejected) - odds_term(rejected, chosen) == pytest.approx(-ratio, rel=1e-9, abs=1e-9)
    assert odds_term(chosen, chosen) == pytest.approx(LN2, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("average", [0.0, -1e-300, -1e-12, -1e-8, -1e-7, -1e-3, -1.0, -100.0, -1e4])
def test_log_odds_are_finite_and_exact(dtype, average):
    leaf = torch.tensor(average, dtype=dtype, requires_grad=True)
    got = log_odds(leaf)
    got.backward()
    assert got.isfinite() and leaf.grad.isfinite()
    a = leaf.double().item()
    if a <= -torch.finfo(dtype).eps:
        assert got.item() == pytest.approx(a - math.log(-math.expm1(a)), rel=1e-6)
        assert leaf.grad.item() == pytest.approx(1 / -math.expm1(a), rel=1e-6)
    else:
        assert got.item() == pytest.approx(-math.log(torch.finfo(dtype).eps), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_certain_completions_have_a_finite_loss_and_gradient(dtype):
    chosen, rejected = (torch.zeros(1, 3, dtype=dtype, requires_grad=True) for _ in range(2))
    mask = torch.ones(1, 3, dtype=torch.bool)
    policy = PairLogps(CompletionLogps(chosen, mask), CompletionLogps(rejected, mask))
    loss = ORPOLoss()(policy, totals=Totals.of(policy)).loss
    loss.backward()
    assert loss.item() == pytest.approx(0.1 * LN2, rel=1e-6)
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(batches("paired", max_size=30.0))
def test_slopes_raise_the_chosen_and_lower_the_rejected(batch):
    leaves = {part: values.requires_grad_() for part, values in batch.tokens["policy"].items()}
    policy = PairLogps(*(CompletionLogps(leaves[part], batch.masks[part]) for part in ("chosen", "rejected", "prompt")))
    ORPOLoss()(policy, totals=Totals.of(policy)).loss.backward()
    assert (leaves["chosen"].grad <= 0).all()
    assert (leaves["rejected"].grad >= 0).all()
    assert (leaves["prompt"].grad <= 0).all()
    assert (leaves["chosen"].grad[batch.masks["chosen"]] < 0).all()  # the NLL never lets go


def test_beta_is_given_by_name():
    assert ORPOLoss(beta=0.5).beta == 0.5
    with pytest.raises(TypeError, match="positional argument"):
        ORPOLoss(0.5)
