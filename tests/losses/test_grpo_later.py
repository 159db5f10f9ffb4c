"""GRPO's variants beyond TRL's by hand: values, slopes, and what each paper promises of them."""

from dataclasses import replace
from math import exp, log

import pytest
import torch

from logratio.losses import KL_ESTIMATORS, CompletionLogps, GRPOLoss, Totals

from ._families import refused
from .test_grpo_types import ADVANTAGES, BY_SEQUENCE, BY_TOKEN, LENGTHS, LOGPS, TOTALS, check, run

# rho = 3/2, 1, 1/2 of A = 2, and 3/2, 1/2 of A = -1; W = 3/4 of both
RHO = [[1.5, 1.0, 0.5], [1.5, 0.5], []]
SCORED = [[x for x in row if x == x] for row in LOGPS]
BY_SUM = [1 / 4] * 3
LOG_W = log(0.75)


def weighted(weights: list[list[float]]) -> tuple[list[list[float]], list[list[float]]]:
    """(losses, slopes) of -w A log p."""
    slopes = [[-w * a for w in row] for row, a in zip(weights, ADVANTAGES, strict=True)]
    return [[s * x for s, x in zip(*rows, strict=True)] for rows in zip(slopes, SCORED, strict=True)], slopes


def test_reinforce():
    check(run(GRPOLoss(loss_type="reinforce")), *weighted([[1.0] * n for n in LENGTHS]), BY_TOKEN)


@pytest.mark.parametrize(("epsilon", "low"), [(None, 0.5), (0.1, 0.9), (0.7, 0.5)])
def test_cispo_with_a_lower_bound(epsilon, low):
    loss = GRPOLoss(loss_type="cispo", epsilon=epsilon, epsilon_high=1.2)
    check(run(loss), *weighted([[1.2, 1.0, low], [1.2, low], []]), BY_TOKEN)


def test_topr():
    """1 where A > 0, W = 3/4 where A < 0, at most 1."""
    check(run(GRPOLoss(loss_type="topr")), *weighted([[1.0] * 3, [0.75] * 2, []]), BY_SUM)
    _, grad = run(GRPOLoss(loss_type="topr"), [[-1.0, -1.0]], [[-1.5, -1.2]], [-1.0])
    assert grad == [[0.25, 0.25]]


def test_kimi():
    """tau / 2 log^2 W once a completion, of slope tau log W at each token."""
    losses, slopes = weighted([[1.0] * n for n in LENGTHS])
    losses = [[x + 0.2 * LOG_W**2 / n for x in row] for row, n in zip(losses, LENGTHS, strict=True)]
    slopes = [[s + 0.4 * LOG_W for s in row] for row in slopes]
    check(run(GRPOLoss(loss_type="kimi", log_ratio_coef=0.4)), losses, slopes, BY_SUM)


@pytest.mark.parametrize("epsilon", [None, 0.5])
def test_cfpo(epsilon):
    """-(rho A - |A| (rho - 1)^2 / (2 epsilon)); at 0.5 the slope at rho = 3/2 of A > 0 and 1/2 of A < 0 is 0."""
    width = epsilon or 0.2
    rows = list(zip(RHO, ADVANTAGES, strict=True))
    losses = [[-(r * a - abs(a) * (r - 1) ** 2 / (2 * width)) for r in row] for row, a in rows]
    slopes = [[-r * (a - abs(a) * (r - 1) / width) for r in row] for row, a in rows]
    got = run(GRPOLoss(loss_type="cfpo", epsilon=epsilon))
    if epsilon:
        assert slopes[0][0] == slopes[1][1] == 0
        slopes[0][0] = slopes[1][1] = pytest.approx(0, abs=1e-15)
        value, grad = got
        assert value == pytest.approx(sum(w * sum(x) for w, x in zip(BY_SEQUENCE, losses, strict=True)), rel=1e-12)
        assert grad[0][0] == pytest.approx(0, abs=1e-15) and grad[1][1] == pytest.approx(0, abs=1e-15)
    else:
        check(got, losses, slopes, BY_SEQUENCE)


@pytest.mark.parametrize(
    ("loss_type", "log_ratio", "slope_of", "value"),
    [
        ("prime", 50.0, 0.2 * 50, 0.1 * 50**2),
        ("prime", -90.0, 0.2 * -90, 0.1 * 90**2),
        ("kimi", 500.0, 0.1 * 500, 0.1 / 2 * 500**2),
        ("kimi", -39.0, 0.1 * -39, 0.1 / 2 * 39**2),
        ("cfpo", 30.0, 0, 4.85e8**2 / 0.4),
        ("cfpo", 19.0, 2 * exp(19) ** 2 / 0.4, exp(19) ** 2 / 0.4),
    ],
)
def test_a_penalty_pulls_back_from_any_distance(loss_type, log_ratio, slope_of, value):
    """Of a log-ratio; that of cfpo, of a ratio, stops at exp(20), where there is no slope. The advantage's own term has
    A = 0, or (cfpo) is far smaller than the square."""
    options, advantage = ({}, 1.0) if loss_type == "cfpo" else ({"log_ratio_coef": 0.1}, 0.0)
    totals = Totals(num_sequences=1, num_tokens=1)
    loss = GRPOLoss(loss_type=loss_type, **options)
    got, [[slope]] = run(loss, [[-1.0]], [[-1.0 - log_ratio]], [advantage], totals)
    assert got == pytest.approx(value, rel=1e-6) and slope == pytest.approx(slope_of, rel=1e-6)


def test_vespo_takes_a_correction_into_its_ratio():
    """w = 2 and 4, the second held at 3: W = 6, phi = exp(3 + 2 log W - 3 W)."""
    x, mu = (torch.tensor([[log(p) for p in row]], dtype=torch.float64) for row in ([0.5, 0.4], [0.25, 0.1]))
    policy, behavior = (CompletionLogps(logps, torch.ones(1, 2, dtype=torch.bool)) for logps in (x, mu))
    loss = GRPOLoss(loss_type="vespo", sampling_correction="token_truncate")
    given = torch.tensor([1.5], dtype=torch.float64)
    value = loss(policy, advantages=given, behavior=behavior, totals=Totals.of(policy)).loss.item()
    assert value == pytest.approx(-exp(3 + 2 * log(6) - 3 * 6) * 1.5 * (log(0.5) + log(0.4)) / 2, rel=1e-12)


def test_vespo_holds_the_factors_of_a_correction():
    """e^30 at e^20 and e^-30 at 1e-8: W = 1e-8 e^20, and not 1."""
    x, mu = (torch.tensor([row], dtype=torch.float64) for row in ([-1.0, -31.0], [-31.0, -1.0]))
    policy, behavior = (CompletionLogps(logps, torch.ones(1, 2, dtype=torch.bool)) for logps in (x, mu))
    loss = GRPOLoss(loss_type="vespo", sampling_correction="decoupled")
    value = loss(policy, advantages=torch.ones(1).double(), behavior=behavior, totals=Totals.of(policy)).loss.item()
    log_w = 20 + log(1e-8)
    assert value == pytest.approx(exp(3 + 2 * log_w - 3 * exp(log_w)) * 32 / 2, rel=1e-9)


def test_cfpo_needs_a_width():
    with refused("epsilon=0.0 must be positive: cfpo divides by it"):
        GRPOLoss(loss_type="cfpo", epsilon=0.0)


def test_pspo():
    """-((1 - a) rho + a) A: 0.6 rho + 0.4."""
    rows = list(zip(RHO, ADVANTAGES, strict=True))
    losses = [[-(0.6 * r + 0.4) * a for r in row] for row, a in rows]
    slopes = [[-0.6 * r * a for r in row] for row, a in rows]
    check(run(GRPOLoss(loss_type="pspo", pspo_alpha=0.4)), losses, slopes, BY_SEQUENCE)
    check(
        run(GRPOLoss(loss_type="pspo", pspo_alpha=1.0)),
        [[-2.0] * 3, [1.0] * 2, []],
        [[0] * 3, [0] * 2, []],
        BY_SEQUENCE,
    )


def test_prime_to_the_old_policy():
    """-rho A + tau log^2 rho."""
    rows = list(zip(RHO, ADVANTAGES, strict=True))
    losses = [[-r * a + 0.1 * log(r) ** 2 for r in row] for row, a in rows]
    slopes = [[-r * a + 0.2 * log(r) for r in row] for row, a in rows]
    check(run(GRPOLoss(loss_type="prime", log_ratio_coef=0.1)), losses, slopes, BY_TOKEN)


def test_prime_to_the_sampler():
    """On policy w = p / mu is the gradient's weight; masked where |p - mu| > 0.1, but for the penalty."""
    p, mu = [0.5, 0.4], [0.25, 0.38]
    x, behavior = (torch.tensor([[log(v) for v in row]], dtype=torch.float64) for row in (p, mu))
    mask = torch.ones(1, 2, dtype=torch.bool)
    policy = CompletionLogps(x.requires_grad_(), mask)
    loss = GRPOLoss(
        loss_type="prime", log_ratio_coef=0.1, sampling_correction="ipo", sampling_clip_min=-0.1, sampling_clip_max=0.1
    )
    given = torch.tensor([3.0], dtype=torch.float64)
    out = loss(policy, advantages=given, behavior=CompletionLogps(behavior, mask), totals=Totals.of(policy)).loss
    out.backward()
    w, d = [0.0, 0.4 / 0.38], [log(2), log(0.4 / 0.38)]
    assert out.item() == pytest.approx(sum(-3 * a + 0.1 * b**2 for a, b in zip(w, d, strict=True)) / 2, rel=1e-12)
    assert x.grad.tolist()[0] == pytest.approx([(-3 * a + 0.2 * b) / 2 for a, b in zip(w, d, strict=True)], rel=1e-12)


def test_fipo():
    """Half-life 1: sums log 3/2 + (hole) + (log 1) / 4 + (log 1/2) / 8, and log 1 + (log 1/2) / 2, log 1/2; the hole is
    a place of its own."""
    loss = GRPOLoss(loss_type="fipo", fipo_half_life=1.0, fipo_clip=5.0)
    first = [exp(log(1.5) - log(2) / 8), 1.0, 1.0]
    second = [exp(log(1.5) - log(2) / 2), 1.0]
    losses = [[-2.4 * first[0], -2 * first[1], -1 * first[2]], [1.5 * second[0], 0.8 * second[1]], []]
    slopes = [[0, -2 * first[1], -1 * first[2]], [1.5 * second[0], 0], []]
    check(run(loss), losses, slopes, BY_TOKEN)


def test_fipos_weight_is_bounded_and_leaves_out_what_delta_bounds():
    """1.2 at most; without the token of rho = 3/2 > 1.4 its sum is what comes behind, below 0."""
    second = 1.5 * exp(log(1.5) - log(2) / 2)
    capped = [[-2.4 * 1.2, -2, -1], [second, 0.8], []]
    check(run(GRPOLoss(loss_type="fipo", fipo_half_life=1.0)), capped, [[0, -2, -1], [second, 0], []], BY_TOKEN)
    plain = GRPOLoss(loss_type="dapo", delta=1.4)
    assert run(GRPOLoss(loss_type="fipo", delta=1.4)) == run(plain)
    assert run(GRPOLoss(loss_type="fipo", fipo_clip=0.0)) == run(GRPOLoss())


def test_fipos_sum_has_what_is_at_delta_and_nothing_above():
    """Half-life 1, rho = exp(1/2) = delta and exp(3/4): the sums are 1/2 and 0."""
    delta = torch.tensor(0.5, dtype=torch.float64).exp().item()
    loss = GRPOLoss(loss_type="fipo", fipo_half_life=1.0, fipo_clip=9.0, epsilon_high=9.0, delta=delta)
    totals = Totals(num_sequences=1, num_tokens=1)
    value, _ = run(loss, [[-0.5, -0.25]], [[-1.0, -1.0]], [1.0], totals)
    assert value == pytest.approx(-delta * exp(0.5) - delta, rel=1e-12)


def test_fipo_of_many_tokens_is_the_plain_sum():
    generator = torch.Generator().manual_seed(0)
    log_ratios = 0.3 * torch.randn(1, 37, generator=generator, dtype=torch.float64)
    old = torch.full((1, 37), -2.0, dtype=torch.float64)
    x = (old + log_ratios).requires_grad_()
    mask = torch.ones(1, 37, dtype=torch.bool)
    loss = GRPOLoss(loss_type="fipo", fipo_half_life=3.0, fipo_clip=9.0, epsilon=0.99, epsilon_high=50.0)
    policy = CompletionLogps(x, mask)
    out = loss(policy, advantages=torch.ones(1), old=CompletionLogps(old, mask), totals=Totals.of(policy)).loss
    d, total = log_ratios[0].tolist(), 0.0
    for t in range(37):
        future = sum(2 ** (-(k - t) / 3) * d[k] for k in range(t, 37))
        total -= min(max(exp(future), 1.0), 10.0) * exp(d[t])
    assert out.item() == pytest.approx(total / 37, rel=1e-12)


@pytest.mark.parametrize("name", ["k3+", "abs"])
def test_kl_estimators(name):
    d = torch.tensor([-0.5, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    value = KL_ESTIMATORS[name](d)
    value.sum().backward()
    values, slopes = {
        "k3+": ([exp(0.5) - 1.5, 0, exp(-2) + 1], [-0.5, 0, 2]),
        "abs": ([0.5, 0, 2], [-1, 0, 1]),
    }[name]
    assert value.tolist() == pytest.approx(values, rel=1e-12) and d.grad.tolist() == slopes


@pytest.mark.parametrize("loss_type", ["dapo", "gmpo", "cispo"])
def test_nll_of_what_was_right(loss_type):
    """mu times the mean of -log p over the tokens of A = 2, whatever the policy term is and is divided by."""
    plain, grads = run(GRPOLoss(loss_type=loss_type))
    totals = replace(TOTALS, num_positive_tokens=12)
    value, more = run(GRPOLoss(loss_type=loss_type, positive_nll_coef=0.6), totals=totals)
    assert value == pytest.approx(plain - 0.6 * sum(SCORED[0]) / 12, rel=1e-12)
    expected = [[g - 0.05 * (x == x) for g, x in zip(grads[0], LOGPS[0], strict=True)], *grads[1:]]
    assert more == [pytest.approx(row, rel=1e-12) for row in expected]


def test_nll_of_tokens_that_were_right():
    """Of four tokens those of A > 0, with 0.5 and 0.3 nats; what is masked does not count."""
    x, mask = torch.tensor([[-0.5, -9.0, -1.0], [-2.0, -0.3, -4.0]]), torch.tensor([[True, True, False]] * 2)
    given = torch.tensor([[1.0, 0.0, 5.0], [-1.0, 3.0, 5.0]])
    policy = CompletionLogps(x, mask)
    totals = Totals.of(policy, advantages=given)
    assert totals.num_positive_tokens == 2
    out = GRPOLoss(positive_nll_coef=0.5)(policy, advantages=given, totals=totals)
    plain = GRPOLoss()(policy, advantages=given, totals=totals).loss
    assert (out.loss - plain).item() == pytest.approx(0.5 * (0.5 + 0.3) / 2, rel=1e-5)
    nll = out.metrics["nll_loss"]
    assert nll.total.item() == pytest.approx(0.8) and nll.count.item() == 2
    given = torch.tensor([1.0, -1.0])
    nll = GRPOLoss(positive_nll_coef=0.5)(policy, advantages=given, totals=totals).metrics["nll_loss"]
    assert nll.total.item() == pytest.approx(9.5) and nll.count.item() == 2


def test_nll_where_nothing_was_right():
    x, mask = torch.tensor([[-0.5]], requires_grad=True), torch.ones(1, 1, dtype=torch.bool)
    policy, given = CompletionLogps(x, mask), torch.zeros(1)
    loss = GRPOLoss(positive_nll_coef=0.5)
    out = loss(policy, advantages=given, totals=Totals.of(policy, advantages=given)).loss
    out.backward()
    assert out.item() == x.grad.item() == 0
    with refused("positive_nll_coef divides by totals.num_positive_tokens, which is None"):
        loss(policy, advantages=given, totals=Totals.of(policy))
