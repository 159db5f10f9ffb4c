"""SFT: numbers by hand, and what dft's gradient is."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings

from logratio.losses import CompletionLogps, SFTLoss, Totals
from logratio.reference.strategies import batches

MASK = torch.tensor([[True, True, True], [False, True, False]])
LOGPS = [[math.log(0.5), math.log(0.25), 0.0], [-99.0, math.log(0.125), -99.0]]


def policy() -> CompletionLogps:
    return CompletionLogps(torch.tensor(LOGPS, dtype=torch.float64, requires_grad=True), MASK)


def test_nll_by_hand():
    """Four tokens: 1, 2, 0 and 3 bits."""
    x = policy()
    loss, metrics = SFTLoss()(x, totals=Totals.of(x))
    assert loss.item() == pytest.approx(6 / 4 * math.log(2))
    assert (metrics["nll"].total.item(), metrics["nll"].count.item()) == (pytest.approx(6 * math.log(2)), 4)
    loss.backward()
    torch.testing.assert_close(x.per_token_logps.grad, -MASK.double() / 4)


def test_every_token_of_the_step_weighs_the_same():
    x = policy()
    loss, _ = SFTLoss()(x, totals=Totals(num_sequences=100, num_tokens=24))
    assert loss.item() == pytest.approx(6 / 24 * math.log(2))


def test_dft_by_hand():
    """-p log p: 1/2 bit, 1/4 * 2, 0, 1/8 * 3; the gradient is -p."""
    x = policy()
    loss, metrics = SFTLoss(loss_type="dft")(x, totals=Totals.of(x))
    assert loss.item() == pytest.approx((1 / 2 + 2 / 4 + 0 + 3 / 8) / 4 * math.log(2))
    assert metrics["nll"].total.item() == pytest.approx(6 * math.log(2))
    loss.backward()
    expected = -torch.tensor([[0.5, 0.25, 1.0], [0.0, 0.125, 0.0]], dtype=torch.float64) / 4
    torch.testing.assert_close(x.per_token_logps.grad, expected)


LOG_Z = [[1.0, -2.0, 3.0], [math.nan, 0.5, math.inf]]
WEIGHTS = [[0.5, 2.0, 0.0], [math.nan, 1.5, 9.0]]


def with_stats(log_z: bool = False, weights: bool = False) -> CompletionLogps:
    """Each a leaf of its own; nothing is read where nothing is scored."""
    z, w = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (LOG_Z, WEIGHTS))
    return CompletionLogps(policy().per_token_logps, MASK, log_z=z if log_z else None, weights=w if weights else None)


def test_z_loss_by_hand():
    """0.1 (log Z)^2 per token, beside nll and beside dft."""
    for loss_type, bits in (("nll", 6), ("dft", 1 / 2 + 2 / 4 + 3 / 8)):
        x = with_stats(log_z=True)
        loss, metrics = SFTLoss(loss_type=loss_type, z_loss_coef=0.1)(x, totals=Totals.of(x))
        assert loss.item() == pytest.approx((bits * math.log(2) + 0.1 * (1 + 4 + 9 + 0.25)) / 4, rel=1e-12)
        loss.backward()
        expected = torch.tensor([[1.0, -2.0, 3.0], [0.0, 0.5, 0.0]], dtype=torch.float64) * 0.2 / 4
        torch.testing.assert_close(x.log_z.grad, expected)
        assert metrics["nll"].total.item() == pytest.approx(6 * math.log(2))  # the metric is the nll alone
        assert set(metrics) == {"nll"}


def test_weighted_tokens_by_hand():
    """Bits 1, 2, 0, 3 weigh 1/2, 2, 0, 3/2: divided by the sum of weights, which get no gradient."""
    x = with_stats(weights=True)
    totals = Totals.of(x.detach())
    assert totals.sum_weights == 4
    loss, metrics = SFTLoss()(x, totals=totals)
    assert loss.item() == pytest.approx((0.5 + 4 + 4.5) / 4 * math.log(2), rel=1e-12)
    loss.backward()
    expected = -torch.tensor([[0.5, 2.0, 0.0], [0.0, 1.5, 0.0]], dtype=torch.float64) / 4
    torch.testing.assert_close(x.per_token_logps.grad, expected, rtol=1e-12, atol=0)
    assert x.weights.grad is None
    assert (metrics["nll"].total.item(), metrics["nll"].count.item()) == (pytest.approx(6 * math.log(2)), 4)


def test_weights_weigh_the_z_loss_too_and_dft():
    x = with_stats(log_z=True, weights=True)
    totals = Totals(num_sequences=2, num_tokens=4, sum_weights=20.0)
    loss = SFTLoss(loss_type="dft", z_loss_coef=0.1)(x, totals=totals).loss
    bits = 0.5 / 2 + 2 * 2 / 4 + 1.5 * 3 / 8
    z = 0.5 * 1 + 2 * 4 + 1.5 * 0.25
    assert loss.item() == pytest.approx((bits * math.log(2) + 0.1 * z) / 20, rel=1e-12)


def test_without_a_sum_of_weights_it_is_divided_by_tokens():
    x = with_stats(weights=True)
    loss = SFTLoss()(x, totals=Totals(num_sequences=9, num_tokens=8)).loss
    assert loss.item() == pytest.approx(9 / 8 * math.log(2), rel=1e-12)
    nothing = SFTLoss()(x, totals=Totals(num_sequences=9, num_tokens=8, sum_weights=0.0)).loss
    assert nothing.item() == 0
    few = SFTLoss()(x, totals=Totals(num_sequences=9, num_tokens=8, sum_weights=0.25)).loss
    assert few.item() == pytest.approx(9 * 4 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 0.0])
def test_eaft_by_hand(alpha):
    """Entropies log 20, 0, 2 log 20 and log 20 / 2 weigh bits 1, 2, 0 and 3; the weight has no gradient."""
    shares = torch.tensor([[1.0, 0.0, 2.0], [math.nan, 0.5, math.nan]], dtype=torch.float64)
    entropy = (shares * math.log(20)).requires_grad_()
    x = CompletionLogps(policy().per_token_logps, MASK, entropy=entropy)
    loss, metrics = SFTLoss(loss_type="eaft", eaft_alpha=alpha)(x, totals=Totals.of(x))
    second = 2.0 if alpha == 0 else 0.0
    assert loss.item() == pytest.approx((1 + second + 3 * 0.5**alpha) / 4 * math.log(2), rel=1e-12)
    assert metrics["nll"].total.item() == pytest.approx(6 * math.log(2))
    loss.backward()
    assert entropy.grad is None
    expected = torch.where(MASK, -(shares**alpha) / 4, 0.0)
    torch.testing.assert_close(x.per_token_logps.grad, expected, rtol=1e-12, atol=0)


def test_eaft_needs_the_entropy():
    assert SFTLoss(loss_type="eaft").stats == ("entropy",)
    assert SFTLoss(loss_type="eaft", z_loss_coef=1.0).stats == ("log_z", "entropy")
    x = policy()
    with pytest.raises(ValueError, match="this loss needs the policy's entropy of every token, which is None"):
        SFTLoss(loss_type="eaft")(x, totals=Totals.of(x))
    with pytest.raises(ValueError, match="eaft_alpha=2.0 is not read by loss_type nll; leave it out"):
        SFTLoss(eaft_alpha=2.0)


def test_gkd_is_the_mean_divergence():
    """Of every scored token, weighed, whatever its log-prob; which divergence it is, it says."""
    mask = torch.tensor([[True, True], [True, False]])
    divergence = torch.tensor([[0.5, 2.0], [1.0, math.nan]], requires_grad=True)
    weights = torch.tensor([[1.0, 3.0], [0.0, 9.0]])
    logps = torch.full((2, 2), -1.0, requires_grad=True)
    x = CompletionLogps(logps, mask, divergence=divergence)
    loss = SFTLoss(loss_type="gkd", gkd_beta=0.1, gkd_temperature=2.0)
    assert loss.divergence == (0.1, 2.0) and SFTLoss().divergence is None
    value, metrics = loss(x, totals=Totals.of(x))
    value.backward()
    assert value.item() == pytest.approx(3.5 / 3) and metrics["nll"].value == 1.0
    assert divergence.grad.tolist() == [[pytest.approx(1 / 3)] * 2, [pytest.approx(1 / 3), 0.0]]
    assert logps.grad is None
    x = CompletionLogps(logps, mask, divergence=divergence, weights=weights)
    assert loss(x, totals=Totals.of(x)).loss.item() == pytest.approx((0.5 + 6.0) / 4)
    with pytest.raises(ValueError, match="needs the policy's divergence of every token, which is None"):
        loss(CompletionLogps(logps, mask), totals=Totals.of(x))
    with pytest.raises(ValueError, match="z_loss_coef=0.1 is not read by loss_type gkd; leave it out"):
        SFTLoss(loss_type="gkd", z_loss_coef=0.1)


def test_options_of_sft():
    assert dataclasses.asdict(SFTLoss()) == {
        "loss_type": "nll",
        "eaft_alpha": 1.0,
        "gkd_beta": 0.5,
        "gkd_temperature": 1.0,
        "z_loss_coef": 0.0,
    }
    assert SFTLoss().stats == () and SFTLoss(z_loss_coef=1e-4).stats == ("log_z",)
    assert not SFTLoss().wants_reference and SFTLoss().window_pass is None
    with pytest.raises(ValueError, match="loss_type='ce' is unknown, expected one of: nll, dft, eaft, gkd$"):
        SFTLoss(loss_type="ce")
    for value, must in ((-0.1, "not be negative"), (math.nan, "be finite"), (math.inf, "be finite")):
        with pytest.raises(ValueError, match=f"^z_loss_coef={value} must {must}$"):
            SFTLoss(z_loss_coef=value)
    x = policy()
    with pytest.raises(ValueError, match="this loss needs the policy's log_z of every token, which is None"):
        SFTLoss(z_loss_coef=0.1)(x, totals=Totals.of(x))


@settings(max_examples=40, deadline=None)
@given(batches("sequence"))
def test_dft_has_the_gradient_of_minus_the_probability(batch):
    logps, mask = batch.tokens["policy"]["completion"].requires_grad_(), batch.masks["completion"]
    x = CompletionLogps(logps, mask)
    (got,) = torch.autograd.grad(SFTLoss(loss_type="dft")(x, totals=Totals.of(x)).loss, logps)
    (expected,) = torch.autograd.grad(-logps.exp().where(mask, 0.0).sum() / max(mask.sum(), 1), logps)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(batches("sequence"))
def test_nll_is_dft_where_the_model_is_certain_and_never_less(batch):
    logps, mask = batch.tokens["policy"]["completion"], batch.masks["completion"]
    x = CompletionLogps(logps, mask)
    certain = CompletionLogps(logps * 0, mask)
    nll, dft = SFTLoss(), SFTLoss(loss_type="dft")
    assert 0 <= dft(x, totals=Totals.of(x)).loss <= nll(x, totals=Totals.of(x)).loss
    assert dft(certain, totals=Totals.of(x)).loss == nll(certain, totals=Totals.of(x)).loss == 0


def test_entropy_and_accuracy_are_metrics_and_no_part_of_the_loss():
    entropy = torch.tensor([[1.0, 2.0, 3.0], [torch.nan, 4.0, torch.nan]], dtype=torch.float64)
    x = policy()
    is_top1 = torch.tensor([[True, False, True], [True, False, True]])
    told = CompletionLogps(x.per_token_logps, MASK, entropy, is_top1=is_top1)
    loss, metrics = SFTLoss()(told, totals=Totals.of(x))
    assert (metrics["entropy"].total.item(), metrics["entropy"].count.item()) == (10.0, 4)
    assert metrics["mean_token_accuracy"].value == 2 / 4
    assert loss == SFTLoss()(x, totals=Totals.of(x)).loss
    assert SFTLoss()(x, totals=Totals.of(x)).metrics.keys() == {"nll"}
