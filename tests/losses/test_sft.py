"""SFT: numbers by hand, and what dft's gradient is."""

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


def test_entropy_is_a_metric_and_no_part_of_the_loss():
    entropy = torch.tensor([[1.0, 2.0, 3.0], [torch.nan, 4.0, torch.nan]], dtype=torch.float64)
    x = policy()
    loss, metrics = SFTLoss()(CompletionLogps(x.per_token_logps, MASK, entropy), totals=Totals.of(x))
    assert (metrics["entropy"].total.item(), metrics["entropy"].count.item()) == (10.0, 4)
    assert loss == SFTLoss()(x, totals=Totals.of(x)).loss
    assert "entropy" not in SFTLoss()(x, totals=Totals.of(x)).metrics
