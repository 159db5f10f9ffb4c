"""DPO, hinge and IPO: numbers by hand, and the laws of a preference between two."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logratio.losses import DPO_TYPES, CompletionLogps, DPOLoss, PairLogps, PairRatios, Totals
from logratio.reference.strategies import batches

every_type = pytest.mark.parametrize("loss_type", DPO_TYPES)
nats = st.floats(-60, 60)
betas = st.floats(0.01, 3)


def side(*rows: list[float]) -> CompletionLogps:
    """Rows of log-probs; short rows are padded."""
    width = max(map(len, rows))
    logps = torch.tensor([row + [torch.nan] * (width - len(row)) for row in rows], dtype=torch.float64)
    return CompletionLogps(logps.requires_grad_(), ~logps.detach().isnan())


# r_w = (-1 - 2) - (-2 - 4) = 3 over 2 tokens; r_l = (-4) - (-3) = -1 over 1 token
POLICY = ([[-1.0, -2.0]], [[-4.0]])
REF = ([[-2.0, -4.0]], [[-3.0]])


def pair(rows: tuple[list[list[float]], list[list[float]]]) -> PairLogps:
    return PairLogps(side(*rows[0]), side(*rows[1]))


BY_HAND = {
    "sigmoid": (math.log1p(math.exp(-0.4)), -0.1 / (1 + math.exp(0.4)), 0.1 / (1 + math.exp(0.4))),
    "hinge": (0.6, -0.1, 0.1),
    "ipo": ((1.5 + 1 - 5) ** 2, -2.5, 5.0),  # 2 (1.5 + 1 - 5) / 2 tokens, and -2 (...) / 1 token
}


@pytest.mark.parametrize(("loss_type", "expected"), BY_HAND.items(), ids=BY_HAND)
def test_by_hand(loss_type, expected):
    """Value, and slope of every token of the chosen and of the rejected completion, at beta = 0.1."""
    policy, ref = pair(POLICY), pair(REF)
    loss, metrics = DPOLoss(loss_type=loss_type)(policy, ref, totals=Totals.of(policy))
    loss.backward()
    slopes = policy.chosen.per_token_logps.grad[0].tolist(), policy.rejected.per_token_logps.grad[0].tolist()
    assert (loss.item(), *slopes[0], *slopes[1]) == pytest.approx((expected[0], expected[1], expected[1], expected[2]))
    assert {name: mean.total.item() for name, mean in metrics.items()} == pytest.approx(
        {
            "rewards/chosen": 0.3,
            "rewards/rejected": -0.1,
            "rewards/accuracies": 1.0,
            "rewards/margins": 0.4,
            "logps/chosen": -3.0,
            "logps/rejected": -4.0,
        }
    )
    assert {mean.count.item() for mean in metrics.values()} == {1}


def test_numbers_by_hand_cover_the_first_variants():
    assert set(BY_HAND) <= set(DPO_TYPES)


def test_the_mean_is_over_pairs_of_the_step():
    policy, ref = pair(POLICY), pair(REF)
    loss, _ = DPOLoss()(policy, ref, totals=Totals(num_sequences=8, num_tokens=1))
    assert loss.item() == pytest.approx(BY_HAND["sigmoid"][0] / 8)


@every_type
def test_a_pair_that_scores_nothing_has_no_loss(loss_type):
    """Beside a real pair, with the step's total of two: half the real pair's loss."""
    rows = tuple([*x, []] for x in POLICY), tuple([*x, []] for x in REF)
    policy, ref = pair(rows[0]), pair(rows[1])
    loss, metrics = DPOLoss(loss_type=loss_type)(policy, ref, totals=Totals.of(policy))
    alone = DPOLoss(loss_type=loss_type)(pair(POLICY), pair(REF), totals=Totals.of(pair(POLICY))).loss
    assert loss.item() == pytest.approx(alone.item() / 2)
    assert metrics["rewards/accuracies"].count.item() == 1


def values(loss_type: str, chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    ones = torch.ones_like(chosen)
    return DPO_TYPES[loss_type](PairRatios(chosen, rejected, ones, ones), DPOLoss(beta=beta, loss_type=loss_type))


def tensors(*numbers: float) -> list[Tensor]:
    return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in numbers]


AT_REFERENCE = {"sigmoid": lambda beta: math.log(2), "hinge": lambda beta: 1.0, "ipo": lambda beta: 1 / (4 * beta**2)}


@pytest.mark.parametrize("loss_type", AT_REFERENCE)
@settings(max_examples=25, deadline=None)
@given(batches("paired"), betas)
def test_value_where_policy_is_reference(loss_type, batch, beta):
    parts = [
        CompletionLogps(
            batch.tokens["policy"][part], batch.masks[part] | (torch.arange(batch.masks[part].shape[1]) == 0)
        )
        for part in ("chosen", "rejected")
    ]
    same = PairLogps(*parts)
    loss = DPOLoss(loss_type=loss_type, beta=beta)(same, same, totals=Totals.of(same)).loss
    assert loss.item() == pytest.approx(AT_REFERENCE[loss_type](beta), rel=1e-12)


# c(beta) in l(r_w, r_l) - l(r_l, r_w) = -c margin; hinge has none (its kinks bound only one side)
ANTISYMMETRY = {"sigmoid": lambda beta: beta, "ipo": lambda beta: 2 / beta}


@pytest.mark.parametrize("loss_type", ANTISYMMETRY)
@settings(max_examples=50, deadline=None)
@given(nats, nats, betas)
def test_swapping_chosen_and_rejected(loss_type, chosen, rejected, beta):
    chosen, rejected = tensors(chosen, rejected)
    difference = values(loss_type, chosen, rejected, beta) - values(loss_type, rejected, chosen, beta)
    expected = (-ANTISYMMETRY[loss_type](beta) * (chosen - rejected)).item()
    assert difference.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@every_type
@settings(max_examples=30, deadline=None)
@given(nats, nats, st.floats(-50, 50), betas)
def test_a_common_shift_of_both_ratios_does_not_matter(loss_type, chosen, rejected, shift, beta):
    """Neither value nor slope; the partition function of the implicit reward cancels."""
    plain, moved = tensors(chosen, rejected), tensors(chosen + shift, rejected + shift)
    results = [values(loss_type, *leaves, beta) for leaves in (plain, moved)]
    assert results[1].item() == pytest.approx(results[0].item(), rel=1e-8, abs=1e-9)
    if abs(1 - beta * (chosen - rejected)) > 1e-6:  # at hinge's kink the shift's rounding decides
        slopes = [torch.autograd.grad(x, leaves) for x, leaves in zip(results, (plain, moved), strict=True)]
        torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
@settings(max_examples=50, deadline=None)
@given(nats, nats, betas)
def test_slopes_push_apart_and_are_bounded_by_beta(loss_type, chosen, rejected, beta):
    leaves = tensors(chosen, rejected)
    up, down = torch.autograd.grad(values(loss_type, *leaves, beta), leaves)
    assert -beta <= up <= 0 <= down <= beta
    assert up == -down


@settings(max_examples=50, deadline=None)
@given(nats, nats, betas)
def test_hinge_is_flat_exactly_beyond_the_margin(chosen, rejected, beta):
    leaves = tensors(chosen, rejected)
    x = beta * (leaves[0] - leaves[1]).item()
    (slope, _) = torch.autograd.grad(values("hinge", *leaves, beta), leaves)
    if x != 1:
        assert (slope == 0) == (x > 1)


@settings(max_examples=50, deadline=None)
@given(nats, betas, st.floats(-5, 5))
def test_ipo_is_least_at_half_the_inverse_beta(rejected, beta, away):
    """The minimum is 0, at an average margin of 1 / (2 beta), whatever the lengths."""
    lengths = torch.tensor(3.0), torch.tensor(7.0)
    margin = torch.tensor(1 / (2 * beta) + away, dtype=torch.float64)
    ratios = PairRatios(3 * (margin + rejected), 7 * torch.tensor(rejected, dtype=torch.float64), *lengths)
    assert DPO_TYPES["ipo"](ratios, DPOLoss(beta=beta, loss_type="ipo")).item() == pytest.approx(away**2, abs=1e-8)


@settings(max_examples=30, deadline=None)
@given(nats, nats)
def test_sigmoid_for_small_and_large_beta(chosen, rejected):
    """(l - ln 2) / beta -> -margin / 2 as beta -> 0, l / beta -> relu(-margin) as beta -> inf."""
    leaves = tensors(chosen, rejected)
    margin = chosen - rejected
    small, large = 1e-6, 1e6
    slope = (values("sigmoid", *leaves, small).item() - math.log(2)) / small
    assert slope == pytest.approx(-margin / 2, rel=1e-3, abs=1e-2)
    assert values("sigmoid", *leaves, large).item() / large == pytest.approx(max(-margin, 0), abs=1e-6)


@every_type
@settings(max_examples=25, deadline=None)
@given(batches("paired", max_size=30.0), st.floats(-20, 20))
def test_the_same_change_of_policy_and_reference_does_not_matter(loss_type, batch, shift):
    def side_of(role: str, part: str, by: float) -> CompletionLogps:
        return CompletionLogps(batch.tokens[role][part] + by, batch.masks[part])

    results = []
    for by in (0.0, shift):
        policy, ref = (
            PairLogps(side_of(role, "chosen", by), side_of(role, "rejected", -2 * by)) for role in ("policy", "ref")
        )
        results.append(DPOLoss(loss_type=loss_type)(policy, ref, totals=Totals.of(policy)).loss.item())
    assert results[1] == pytest.approx(results[0], rel=1e-9, abs=1e-9)
