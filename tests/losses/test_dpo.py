"""DPO, hinge and IPO: numbers by hand, and the laws of a preference between two. The rest: `test_dpo_types.py`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logratio.losses import DPO_TYPES, CompletionLogps, DPOLoss, PairLogps, Totals
from logratio.reference.strategies import batches

OPTIONS = {"exo_pair": {"label_smoothing": 0.01}, "robust": {"label_smoothing": 0.1}}
every_type = pytest.mark.parametrize("loss_type", DPO_TYPES)
MARGINS = ("sigmoid", "hinge", "ipo", "sigmoid_norm", "exo_pair", "robust", "cdpo", "discopop", "r_dpo", "beta_dpo")
"""Functions of r_w - r_l, at equal lengths."""
nats = st.floats(-60, 60)
betas = st.floats(0.01, 3)


def side(*rows: list[float], entropy: bool = False) -> CompletionLogps:
    """Rows of log-probs; short rows are padded. With the same entropy everywhere, if at all."""
    width = max(map(len, rows))
    logps = torch.tensor([row + [torch.nan] * (width - len(row)) for row in rows], dtype=torch.float64)
    return CompletionLogps(
        logps.requires_grad_(), ~logps.isnan(), entropy=torch.full_like(logps, 1.5) if entropy else None
    )


# r_w = (-1 - 2) - (-2 - 4) = 3 over 2 tokens; r_l = (-4) - (-3) = -1 over 1 token
POLICY = ([[-1.0, -2.0]], [[-4.0]])
REF = ([[-2.0, -4.0]], [[-3.0]])


def pair(rows: tuple[list[list[float]], list[list[float]]], entropy: bool = False) -> PairLogps:
    chosen, rejected = (side(*x, entropy=entropy) for x in rows)
    return PairLogps(chosen, rejected, margin=torch.full((len(chosen.sums),), 0.3))


def loss_of(loss: DPOLoss, policy: PairLogps, ref: PairLogps) -> Tensor:
    """The loss of a step that is this one batch."""
    return loss(policy, ref, totals=Totals.of(policy, loss.collect(policy, ref))).loss


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
    """Beside a real pair, with the step's total of two: half the real pair's loss; sft divides by tokens.

    Whatever the reference has there.
    """
    rows = tuple([*x, []] for x in POLICY), tuple([*x, [y]] for x, y in zip(REF, (-5.0, -9.0), strict=True))
    policy, ref = pair(rows[0]), pair(rows[1], entropy=True)
    loss = DPOLoss(loss_type=loss_type, **OPTIONS.get(loss_type, {}))
    value, alone = loss_of(loss, policy, ref), loss_of(loss, pair(POLICY), pair(REF, entropy=True))
    assert value.item() == pytest.approx(alone.item() / (1 if loss_type == "sft" else 2))
    value.backward()
    assert (policy.chosen.per_token_logps.grad[1] == 0).all() and (policy.rejected.per_token_logps.grad[1] == 0).all()
    metrics = loss(policy, ref, totals=Totals.of(policy, loss.collect(policy, ref))).metrics
    assert {mean.count.item() for mean in metrics.values()} == {1}


def values(loss_type: str, chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """The loss of one pair with one token each and these log-ratios."""
    policy = pair_of(chosen[None, None], rejected[None, None])
    ref = pair_of(torch.zeros(1, 1).double(), torch.zeros(1, 1).double())
    return loss_of(DPOLoss(beta=beta, loss_type=loss_type, **OPTIONS.get(loss_type, {})), policy, ref)


def pair_of(chosen: Tensor, rejected: Tensor) -> PairLogps:
    return PairLogps(*(CompletionLogps(x, torch.ones_like(x, dtype=torch.bool)) for x in (chosen, rejected)))


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


@pytest.mark.parametrize("loss_type", MARGINS)
@settings(max_examples=15, deadline=None)
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


@settings(max_examples=30, deadline=None)
@given(nats, betas, st.floats(-5, 5))
def test_ipo_is_least_at_half_the_inverse_beta(rejected, beta, away):
    """The minimum is 0, at an average margin of 1 / (2 beta), whatever the lengths."""
    chosen = rejected + 1 / (2 * beta) + away
    policy = pair(([[chosen] * 3], [[rejected] * 7]))
    ref = pair(([[0.0] * 3], [[0.0] * 7]))
    loss = loss_of(DPOLoss(beta=beta, loss_type="ipo"), policy, ref)
    assert loss.item() == pytest.approx(away**2, rel=1e-9, abs=1e-8)


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


@pytest.mark.parametrize("loss_type", sorted(set(DPO_TYPES) - {"aot", "sft", "irpo", "rainbow", "alpha_dpo", "h_dpo"}))
@settings(max_examples=10, deadline=None)
@given(batches("paired", max_size=30.0), st.floats(-20, 20))
def test_the_same_change_of_policy_and_reference_does_not_matter(loss_type, batch, shift):
    """Except where the log-probs count by themselves, or are sorted apart from the reference's."""

    def side_of(role: str, part: str, by: float) -> CompletionLogps:
        entropy = batch.tokens["entropy"][part]
        return CompletionLogps(batch.tokens[role][part] + by, batch.masks[part], entropy=entropy)

    loss, results = DPOLoss(loss_type=loss_type, **OPTIONS.get(loss_type, {})), []
    for by in (0.0, shift):
        policy, ref = (
            PairLogps(side_of(role, "chosen", by), side_of(role, "rejected", -2 * by), margin=batch.rows["margin"])
            for role in ("policy", "ref")
        )
        results.append(loss_of(loss, policy, ref).item())
    assert results[1] == pytest.approx(results[0], rel=1e-8, abs=1e-9)
