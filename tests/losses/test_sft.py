"""SFT: numbers by hand, and what dft's gradient is."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings

from logratio.losses import CompletionLogps, SFTLoss, Totals, linear_jsd, linear_logps
from logratio.losses.types import Divergence
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
    assert loss.divergence == Divergence(0.1, 2.0, False, True) and SFTLoss().divergence is None
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


def test_asft_of_three_words_by_hand():
    """p_0 = (1/2, 1/4, 1/4), p = (1/8, 3/8, 1/2), the token is the last: -p log p = 1/2 ln 2, and KL(p_0 || p) =
    1/2 ln 4 + 1/4 ln 2/3 + 1/4 ln 1/2 = ln 2 - 1/4 ln 3; KL(p || p_0) would be 3/8 ln 3 - 1/8 ln 2."""
    start, now = (torch.tensor([p], dtype=torch.float64).log() for p in ([0.5, 0.25, 0.25], [0.125, 0.375, 0.5]))
    loss, words = SFTLoss(loss_type="asft", asft_alpha=2.0), torch.eye(3, dtype=torch.float64)
    assert loss.divergence == Divergence(0.0, 1.0, True, False)
    divergence = linear_jsd(now, words, start, words, **loss.divergence.jsd)[None]
    x = CompletionLogps(now[:, -1:], torch.tensor([[True]]), divergence=divergence)
    value, metrics = loss(x, totals=Totals.of(x))
    kl = math.log(2) - math.log(3) / 4
    assert value.item() == pytest.approx(0.5 * math.log(2) + 2 * kl, rel=1e-12)
    assert metrics["kl"].value == pytest.approx(kl, rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(batches("sequence", max_size=30.0))
def test_asft_is_dft_and_a_weighed_divergence(batch):
    """Both weighed by the tokens' weights, which the metric is not; at 0 dft alone, with the metric."""
    mask, tokens = batch.masks["completion"], {k: v["completion"] for k, v in batch.tokens.items()}
    x = CompletionLogps(
        tokens["policy"].requires_grad_(),
        mask,
        divergence=tokens["divergence"].requires_grad_(),
        weights=tokens.get("weights"),
    )
    totals = Totals.of(x)
    dft = SFTLoss(loss_type="dft")(x, totals=totals).loss
    kl = SFTLoss(loss_type="gkd")(x, totals=totals).loss
    for alpha in (0.0, 0.05, 3.0):
        value, metrics = SFTLoss(loss_type="asft", asft_alpha=alpha)(x, totals=totals)
        assert value.item() == pytest.approx((dft + alpha * kl).item(), rel=1e-12)
        grads, expected = (
            torch.autograd.grad(of, (x.per_token_logps, x.divergence), retain_graph=True)
            for of in (value, dft + alpha * kl)
        )
        assert all(torch.allclose(a, b, rtol=1e-12, atol=0) for a, b in zip(grads, expected, strict=True))
        if mask.any():
            assert metrics["kl"].value == pytest.approx(tokens["divergence"][mask].mean().item())


def test_asft_has_the_gradient_of_its_formula_over_whole_logits():
    """By plain autograd of [N, V], from the hidden states and the head on."""
    torch.manual_seed(0)
    hidden, weight, before, start = (torch.randn(n, 6, dtype=torch.float64) for n in (5, 11, 5, 11))
    targets, loss = torch.tensor([3, 0, 10, 7, 7]), SFTLoss(loss_type="asft", asft_alpha=0.7, z_loss_coef=0.1)
    grads = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            out = linear_logps(h, w, targets, stats=loss.stats)
            far = linear_jsd(h, w, before, start, **loss.divergence.jsd)
            x = CompletionLogps(out.logps[None], targets[None] > -1, log_z=out.log_z[None], divergence=far[None])
            value = loss(x, totals=Totals.of(x)).loss
        else:
            z, p_0 = h @ w.T, (before @ start.T).softmax(-1)
            log_p, log_z = z.log_softmax(-1), z.logsumexp(-1)
            of_token = log_p[torch.arange(5), targets]
            kl = (p_0 * (p_0.log() - log_p)).sum(-1)
            value = (-of_token.detach().exp() * of_token + 0.7 * kl + 0.1 * log_z**2).mean()
        grads.append([value.detach(), *torch.autograd.grad(value, (h, w))])
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_asft_needs_the_divergence():
    x = policy()
    with pytest.raises(ValueError, match="needs the policy's divergence of every token, which is None"):
        SFTLoss(loss_type="asft")(x, totals=Totals.of(x))
    with pytest.raises(ValueError, match="asft_alpha=0.1 is not read by loss_type dft; leave it out"):
        SFTLoss(loss_type="dft", asft_alpha=0.1)
    with pytest.raises(ValueError, match="asft_alpha=-0.1 must not be negative"):
        SFTLoss(loss_type="asft", asft_alpha=-0.1)


def test_options_of_sft():
    assert dataclasses.asdict(SFTLoss()) == {
        "loss_type": "nll",
        "eaft_alpha": 1.0,
        "asft_alpha": 0.05,
        "gkd_beta": 0.5,
        "gkd_temperature": 1.0,
        "z_loss_coef": 0.0,
    }
    assert SFTLoss().stats == () and SFTLoss(z_loss_coef=1e-4).stats == ("log_z",)
    assert not SFTLoss().wants_reference and SFTLoss().window_pass is None
    with pytest.raises(ValueError, match="loss_type='ce' is unknown, expected one of: nll, dft, eaft, asft, gkd$"):
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
