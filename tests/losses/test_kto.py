"""KTO: numbers by hand, and the laws of a value function around a reference point."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logratio.losses import CompletionLogps, KTOLoss, Totals
from logratio.reference.strategies import batches

nats = st.floats(-60, 60)
betas = st.floats(0.01, 3)

MASK = torch.tensor([[True, True], [True, False], [False, False]])
LABEL = torch.tensor([True, False, True])
REF = torch.tensor([[-2.0, -4.0], [-3.0, -9.0], [-1.0, -1.0]], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def policy() -> CompletionLogps:
    """Log-ratios 3, -1 and, of a row with nothing scored, 0."""
    logps = torch.tensor([[-1.0, -2.0], [-4.0, -9.0], [-7.0, -1.0]], dtype=torch.float64)
    return CompletionLogps(logps.requires_grad_(), MASK)


def test_what_has_nothing_scored_is_in_no_metric():
    x, totals = policy(), Totals(num_sequences=3, num_tokens=3, collected=torch.zeros(3))
    metrics = KTOLoss()(x, CompletionLogps(REF, MASK), torch.tensor([True, False, False]), totals=totals).metrics
    assert {metrics[f"{of}/rejected"].count.item() for of in ("rewards", "logps")} == {1}


@pytest.mark.parametrize(("collected", "z"), [([4.0, -1.0, 3.0], 2.0), ([-4.0, 1.0], 0.0)])
def test_by_hand(collected, z):
    """(0.7 sigmoid(-(3 - z) / 10) + 1.9 sigmoid((-1 - z) / 10)) / 3 at beta = 0.1; z is never negative."""
    x = policy()
    loss = KTOLoss(desirable_weight=0.7, undesirable_weight=1.9)
    totals = Totals.of(x, torch.tensor(collected, dtype=torch.float64))
    value, metrics = loss(x, CompletionLogps(REF, MASK), LABEL, totals=totals)
    good, bad = sigmoid(-0.1 * (3 - z)), sigmoid(0.1 * (-1 - z))
    assert value.item() == pytest.approx((0.7 * good + 1.9 * bad) / 3, rel=1e-12)
    value.backward()
    up, down = 0.7 * 0.1 * good * (1 - good) / 3, 1.9 * 0.1 * bad * (1 - bad) / 3
    expected = torch.tensor([[-up, -up], [down, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(x.per_token_logps.grad, expected, rtol=1e-12, atol=0)
    means = {name: (mean.total.item(), mean.count.item()) for name, mean in metrics.items()}
    assert means == {
        "kl": (z, 1),
        "rewards/chosen": (pytest.approx(0.3), 1),
        "rewards/rejected": (pytest.approx(-0.1), 1),
        "logps/chosen": (-3.0, 1),
        "logps/rejected": (-4.0, 1),
    }


def test_a_rows_weight_multiplies_its_loss_and_not_the_divisor():
    """As above with z = 2 and row weights 0.5 and 4; where nothing is scored no weight is read."""
    x = policy()
    weights = torch.tensor([[0.5, 0.5], [4.0, math.nan], [math.nan, 9.0]], requires_grad=True)
    weighted = CompletionLogps(x.per_token_logps, MASK, weights=weights)
    totals = Totals.of(weighted.detach(), torch.tensor([4.0, -1.0, 3.0], dtype=torch.float64))
    value = KTOLoss()(weighted, CompletionLogps(REF, MASK), LABEL, totals=totals).loss
    assert value.item() == pytest.approx((0.5 * sigmoid(-0.1) + 4 * sigmoid(-0.3)) / 3, rel=1e-7)
    value.backward()
    assert weights.grad is None and x.per_token_logps.grad[2].tolist() == [0, 0]
    assert x.per_token_logps.grad[1, 0].item() == pytest.approx(4 * 0.1 * sigmoid(-0.3) * sigmoid(0.3) / 3, rel=1e-7)


def test_humanline_clips_each_token_of_both_passes():
    """Ratios 1, 2 and -1 clipped to (-0.5, 1.5): 2.5 and -0.5; the tokens beyond have no gradient."""
    x, ref, loss = policy(), CompletionLogps(REF, MASK), KTOLoss(humanline_clip=(-0.5, 1.5))
    assert loss.collect(x, ref).tolist() == [2.5, -0.5, 0.0]
    value = loss(x, ref, LABEL, totals=Totals.of(x, torch.zeros(1, dtype=torch.float64))).loss
    assert value.item() == pytest.approx((sigmoid(-0.25) + sigmoid(-0.05)) / 3, rel=1e-12)
    value.backward()
    slope = -0.1 * sigmoid(-0.25) * sigmoid(0.25) / 3
    assert x.per_token_logps.grad.tolist() == [[pytest.approx(slope), 0], [0, 0], [0, 0]]
    with pytest.raises(ValueError, match=r"^humanline_clip=\(1.0, 2.0\) must be two numbers around 0, as -1 1.5$"):
        KTOLoss(humanline_clip=(1.0, 2.0))


def test_collects_log_ratios():
    assert KTOLoss().collect(policy(), CompletionLogps(REF, MASK)).tolist() == [3.0, -1.0, 0.0]
    with pytest.raises(ValueError, match="ref must have the policy's rows"):
        KTOLoss().collect(policy(), CompletionLogps(REF[:1], MASK[:1]))


@pytest.mark.parametrize("collected", [None, torch.zeros(0)])
def test_the_kl_term_must_have_been_collected(collected):
    x = policy()
    with pytest.raises(ValueError, match="totals.collected; a step of one example has none, so use at least two"):
        KTOLoss()(x, CompletionLogps(REF, MASK), LABEL, totals=Totals.of(x, collected))


@pytest.mark.parametrize("label", [LABEL.long(), LABEL.double(), LABEL[:2], LABEL[:, None]], ids=str)
def test_labels_that_do_not_fit(label):
    x = policy()
    with pytest.raises(ValueError, match=r"label must be bool \[3\], got"):
        KTOLoss()(x, CompletionLogps(REF, MASK), label, totals=Totals.of(x, torch.zeros(1)))


def value(r: float, z: float, label: bool, **options: float | str) -> tuple[float, float]:
    """(loss, slope in r) of one example with one token."""
    leaf = torch.tensor([[r]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    x, ref = CompletionLogps(leaf, one), CompletionLogps(torch.zeros_like(leaf), one)
    totals = Totals.of(x, torch.tensor([z], dtype=torch.float64))
    loss = KTOLoss(**options)(x, ref, torch.tensor([label]), totals=totals).loss
    loss.backward()
    return loss.item(), leaf.grad.item()


@settings(max_examples=40, deadline=None)
@given(nats, st.floats(0, 60), betas)
def test_a_label_flipped_and_its_ratio_reflected_about_z_is_the_same(r, z, beta):
    loss, slope = value(r, z, True, beta=beta)
    flipped, opposite = value(2 * z - r, z, False, beta=beta)
    assert flipped == pytest.approx(loss, rel=1e-9) and opposite == pytest.approx(-slope, rel=1e-9, abs=1e-15)


@settings(max_examples=40, deadline=None)
@given(nats, nats, betas, st.floats(0.1, 3))
def test_both_labels_at_one_ratio_sum_to_the_weight(r, z, beta, weight):
    options = {"beta": beta, "desirable_weight": weight, "undesirable_weight": weight}
    (good, up), (bad, down) = (value(r, z, label, **options) for label in (True, False))
    assert good + bad == pytest.approx(weight, rel=1e-12)
    assert up == pytest.approx(-down, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@settings(max_examples=40, deadline=None)
@given(nats, nats, st.booleans(), betas, st.floats(0.1, 3))
def test_range_and_slope(loss_type, r, z, label, beta, weight):
    """In [0, weight], falling in r where desirable and rising where not, by at most beta weight / 4."""
    options = {"beta": beta, "desirable_weight": weight, "undesirable_weight": weight, "loss_type": loss_type}
    loss, slope = value(r, z, label, **options)
    assert 0 <= loss <= weight
    assert 0 <= (-slope if label else slope) <= beta * weight / 4 * (1 + 1e-12)


@settings(max_examples=25, deadline=None)
@given(batches("labeled"), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(-30, 0))
def test_at_the_reference_every_scored_example_costs_half_its_weight(batch, good, bad, z):
    """z is held at 0, whatever negative number was collected."""
    x = CompletionLogps(batch.tokens["policy"]["completion"], batch.masks["completion"])
    label = batch.rows["label"]
    totals = Totals.of(x, torch.tensor([z], dtype=torch.float64))
    loss = KTOLoss(desirable_weight=good, undesirable_weight=bad)(x, x, label, totals=totals).loss
    scored: Tensor = x.completion_mask.any(-1)
    expected = (good * int((label & scored).sum()) + bad * int((~label & scored).sum())) / 2 / len(batch)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(batches("labeled", max_size=30.0), st.floats(-20, 20))
def test_the_same_change_of_policy_and_reference_does_not_matter(batch, shift):
    mask, collected = batch.masks["completion"], batch.collected
    losses = []
    for by in (0.0, shift):
        x, ref = (CompletionLogps(batch.tokens[role]["completion"] + by, mask) for role in ("policy", "ref"))
        losses.append(KTOLoss()(x, ref, batch.rows["label"], totals=Totals.of(x, collected)).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
