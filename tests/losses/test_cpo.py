"""CPO, SimPO, AlphaPO, SimPER and TPO by hand: values and slopes, where each divisor comes from, what is refused."""

import dataclasses
import math
from math import exp, log
from typing import Any

import pytest
import torch

from logratio.losses import CPO_TYPES, TPO_TYPES, CompletionLogps, CPOLoss, Loss, PairLogps, Totals, TPOLoss

H = 0.5
"""beta"""
E = {"label_smoothing": 0.2}


def sp(x: float) -> float:
    return math.log1p(exp(x))


def sg(x: float) -> float:
    return 1 / (1 + exp(-x))


def row(logps: list[float], dtype: torch.dtype = torch.float64) -> CompletionLogps:
    """One completion; NaN is a hole in the mask."""
    values = torch.tensor([logps], dtype=dtype, requires_grad=True)
    return CompletionLogps(values, ~values.detach().isnan())


def grads(completion: CompletionLogps) -> list[float]:
    return completion.per_token_logps.grad.flatten().tolist()


# Chosen: two tokens and a hole, s = -3 or -1.5. Rejected: four tokens, s = -4 or -1. Gold: one token, -7.
def triple() -> PairLogps:
    return PairLogps(row([-1.0, math.nan, -2.0]), row([-1.0, -1.0, -0.5, -1.5]), gold=row([math.nan, -7.0]))


def run(loss: Loss, policy: PairLogps, **totals: Any) -> tuple[float, float, float]:
    """(value, slope of a chosen token, slope of a rejected token), in a step of one pair and 10 chosen, 20 gold."""
    known = {"num_sequences": 1, "num_tokens": 99, "num_chosen_tokens": 10, "num_gold_tokens": 20} | totals
    value = loss(policy, totals=Totals(**known)).loss
    value.backward()
    chosen, rejected = grads(policy.chosen), grads(policy.rejected)
    assert chosen[1] == 0 and chosen[0] == chosen[2] and len(set(rejected)) == 1
    return value.item(), chosen[0], rejected[0]


def preference(loss: Any, slope: float, tokens: tuple[int, int] = (1, 1)) -> tuple[float, float, float]:
    """The loss of the pair, and its slope in s_w - s_l as that of a chosen and of a rejected token."""
    return loss, slope / tokens[0], -slope / tokens[1]


# loss_type: (options, the loss of the pair, slopes), without the NLL; sums: x = 1/2, averages: x = -1/4
SUMS, AVERAGES = 0.5, -0.25
LENGTHS = (2, 4)
PAIRS = [
    ("sigmoid", {}, preference(sp(-SUMS), -H * sg(-SUMS))),
    ("sigmoid", E, preference(0.8 * sp(-SUMS) + 0.2 * sp(SUMS), H * (sg(SUMS) - 0.8))),
    ("hinge", {}, preference(1 - SUMS, -H)),
    ("hinge", {"beta": 1.0}, preference(0, 0)),  # at the kink
    ("hinge", {"beta": 0.99}, preference(0.01, -0.99)),
    ("hinge", {"beta": 3.0}, preference(0, 0)),
    ("ipo", {}, preference((-0.5 - 1) ** 2, 2 * -1.5, LENGTHS)),
    ("ipo", {"beta": 1.25}, preference((-0.5 - 0.4) ** 2, 2 * -0.9, LENGTHS)),
    ("simpo", {}, preference(sp(0.75), -H * sg(0.75), LENGTHS)),
    ("simpo", {"simpo_gamma": -1.0}, preference(sp(-0.75), -H * sg(-0.75), LENGTHS)),
    ("simpo", E, preference(0.8 * sp(0.75) + 0.2 * sp(-0.75), H * (sg(-0.75) - 0.8), LENGTHS)),
    ("alphapo", {}, preference(sp(0.75), -H * sg(0.75), LENGTHS)),
    ("simper", {}, (exp(-1) - exp(-1.5), -exp(-1.5) / 2, exp(-1) / 4)),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_cpo_by_hand(pair, weight):
    loss_type, options, (value, up, down) = pair
    scaled = {} if loss_type == "simper" else {"beta": H}
    loss = CPOLoss(**{"loss_type": loss_type, "cpo_alpha": weight} | scaled | options)
    expected = value + weight * 3 / 10, up - weight / 10, down
    assert run(loss, triple()) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_hand_numbers_for_each_variant():
    assert {pair[0] for pair in PAIRS} == set(CPO_TYPES)
    assert set(TPO_TYPES) == {"sigmoid", "hinge", "ipo", "tpo-l"}


@pytest.mark.parametrize("loss_type", CPO_TYPES)
def test_the_nll_is_on_unless_the_variant_has_none(loss_type):
    totals = {"num_sequences": math.inf}  # leaves the NLL alone
    value, up, down = run(CPOLoss(loss_type=loss_type), triple(), **totals)
    assert (value, up, down) == pytest.approx((0, 0, 0) if loss_type in ("alphapo", "simper") else (0.3, -0.1, 0))


# (1 - P^-alpha) / alpha of the sums -3, -4 or the averages -1.5, -1, and its slope P^-alpha
ALPHA = 0.25
BENT = {s: (1 - exp(-0.25 * s)) / 0.25 for s in (-3, -4, -1.5, -1)}


@pytest.mark.parametrize(
    ("loss_type", "s_w", "s_l", "formula", "slope"),
    [
        ("sigmoid", -3, -4, lambda d: sp(-H * d), lambda d: -H * sg(-H * d)),
        ("hinge", -3, -4, lambda d: max(0, 1 - H * d), lambda d: -H if H * d < 1 else 0),
        ("ipo", -1.5, -1, lambda d: (d - 1) ** 2, lambda d: 2 * (d - 1)),
        ("simpo", -1.5, -1, lambda d: sp(0.5 - H * d), lambda d: -H * sg(0.5 - H * d)),
        ("alphapo", -1.5, -1, lambda d: sp(0.5 - H * d), lambda d: -H * sg(0.5 - H * d)),
    ],
)
def test_alpha_bends_the_log_probability_of_every_variant(loss_type, s_w, s_l, formula, slope):
    """AlphaPO: (1 - P^-alpha) / alpha; its slope in log P is P^-alpha."""
    d, tokens = BENT[s_w] - BENT[s_l], (2, 4) if s_w == -1.5 else (1, 1)
    up, down = slope(d) * exp(-0.25 * s_w) / tokens[0], -slope(d) * exp(-0.25 * s_l) / tokens[1]
    loss = CPOLoss(loss_type=loss_type, beta=H, cpo_alpha=0.0, alpha=ALPHA)
    assert run(loss, triple()) == pytest.approx((formula(d), up, down), rel=1e-12)
    metrics = loss(triple(), totals=Totals(num_sequences=1, num_tokens=6)).metrics
    assert metrics["rewards/chosen"].total.item() == pytest.approx(H * BENT[s_w])
    assert metrics["logps/chosen"].total.item() == -3


def test_alpha_in_simper_and_below_zero():
    chosen, rejected = ((1 - exp(0.5 * s)) / -0.5 for s in (-1.5, -1))  # alpha = -1/2
    value, up, down = run(CPOLoss(loss_type="simper", alpha=-0.5), triple())
    assert value == pytest.approx(exp(rejected) - exp(chosen), rel=1e-12)
    assert up == pytest.approx(-exp(chosen) * exp(-0.75) / 2) and down == pytest.approx(exp(rejected) * exp(-0.5) / 4)


def test_alpha_near_zero_is_the_logarithm():
    """In float32, where 1 - P^-alpha would keep no digits at alpha = 1e-6."""
    policy = PairLogps(row([-1.5], torch.float32), row([-1.0], torch.float32))
    loss = CPOLoss(loss_type="simpo", beta=H, cpo_alpha=0.0, alpha=1e-6)
    assert loss(policy, totals=Totals.of(policy)).loss.item() == pytest.approx(sp(0.75), rel=1e-6)


def test_the_exponent_of_alpha_stops_at_forty():
    """P = exp(-300): P^-alpha held at exp(40), without a slope; at exp(-39 * 4) it has one."""
    loss = CPOLoss(loss_type="ipo", beta=H, cpo_alpha=0.0, alpha=ALPHA)
    for s, exponent in ((-300.0, 40), (-156.0, 39)):
        policy = PairLogps(row([s]), row([0.0]))
        value = loss(policy, totals=Totals.of(policy)).loss
        value.backward()
        assert value.item() == pytest.approx(((1 - exp(exponent)) / 0.25 - 1) ** 2, rel=1e-12)
        assert (grads(policy.chosen)[0] == 0) == (exponent == 40)


def test_each_term_has_its_own_divisor():
    """Two pairs of four of the step; an empty rejected completion scores 0; a pair with nothing scored has no loss."""
    nan = math.nan
    chosen = [[-1.0, -2.0], [-5.0, nan], [nan, nan]]
    rejected = [[-4.0], [nan], [nan]]
    sides = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
    policy = PairLogps(*(CompletionLogps(x, ~x.detach().isnan()) for x in sides))
    totals = Totals(num_sequences=4, num_tokens=99, num_chosen_tokens=16)
    for loss_type, (first, second), lengths in (("sigmoid", (1, -5), (1, 1)), ("simpo", (2.5, -5), (2, 1))):
        gamma = 0.5 if loss_type == "simpo" else 0
        loss = CPOLoss(loss_type=loss_type, beta=H)
        value = loss(policy, totals=totals).loss
        up, down = torch.autograd.grad(value, sides)
        assert value.item() == pytest.approx((sp(gamma - H * first) + sp(gamma - H * second)) / 4 + 8 / 16, rel=1e-12)
        of_first, of_second = (-H * sg(gamma - H * d) / 4 for d in (first, second))
        assert up[0].tolist() == pytest.approx([of_first / lengths[0] - 1 / 16] * 2, rel=1e-12)
        assert up[1].tolist() == pytest.approx([of_second / lengths[1] - 1 / 16, 0], rel=1e-12)
        assert down.flatten().tolist() == pytest.approx([-of_first, 0, 0], rel=1e-12) and (up[2] == 0).all()
        metrics = loss(policy, totals=totals).metrics
        assert (metrics["nll_loss"].total.item(), metrics["nll_loss"].count.item()) == (8, 3)
        assert metrics["rewards/chosen"].total.item() == H * (-8 if loss_type == "sigmoid" else -6.5)
        assert metrics["rewards/rejected"].total.item() == H * -4
        assert metrics["rewards/accuracies"].total.item() == 1
        assert {m.count.item() for name, m in metrics.items() if name != "nll_loss"} == {2}


def test_a_step_without_chosen_tokens_has_no_nll():
    assert run(CPOLoss(loss_type="hinge", beta=3.0), triple(), num_chosen_tokens=0) == (0, 0, 0)


TRIPLES = [
    ("sigmoid", {}, preference(sp(-SUMS), -H * sg(-SUMS))),
    ("sigmoid", E, preference(0.8 * sp(-SUMS) + 0.2 * sp(SUMS), H * (sg(SUMS) - 0.8))),
    ("hinge", {}, preference(1 - SUMS, -H)),
    ("ipo", {}, preference((-0.5 - 1) ** 2, 2 * -1.5, LENGTHS)),
    ("tpo-l", {}, preference(sp(0.75), -H * sg(0.75), LENGTHS)),
    ("tpo-l", {"tpo_l_gamma": 1.25}, preference(sp(1.5), -H * sg(1.5), LENGTHS)),
    ("tpo-l", E, preference(0.8 * sp(0.75) + 0.2 * sp(-0.75), H * (sg(-0.75) - 0.8), LENGTHS)),
]


@pytest.mark.parametrize("case", TRIPLES, ids=str)
@pytest.mark.parametrize("weight", [{}, {"tpo_alpha": 0.3}, {"tpo_alpha": 0.0}], ids=str)
def test_tpo_by_hand(case, weight):
    """The NLL is that of the gold completion, the token mean over the step: 7 / 20."""
    loss_type, options, (value, up, down) = case
    loss, policy = TPOLoss(**{"loss_type": loss_type, "beta": H} | weight | options), triple()
    alpha = weight.get("tpo_alpha", 1.0)
    expected = (value + alpha * 7 / 20, up, down)
    assert run(loss, policy) == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert loss.scores_gold == (alpha != 0)
    metrics = loss(policy, totals=Totals.of(policy)).metrics
    scores = (-1.5, -1.0) if loss_type in ("ipo", "tpo-l") else (-3.0, -4.0)  # averages, or sums
    assert metrics["rewards/chosen"].total.item() == H * scores[0]
    assert metrics["rewards/rejected"].total.item() == H * scores[1]
    if not alpha:  # the gold completion is not looked at
        assert policy.gold.per_token_logps.grad is None and "nll_loss" not in metrics
        return
    assert grads(policy.gold) == pytest.approx([0, -alpha / 20], rel=1e-12)
    assert (metrics["nll_loss"].total.item(), metrics["nll_loss"].count.item()) == (7.0, 1)


def test_tpo_without_a_gold_completion():
    policy = PairLogps(triple().chosen, triple().rejected)
    message = "tpo_alpha=1.0 needs the gold completions, policy.gold is None"
    with pytest.raises(ValueError, match=message):
        TPOLoss()(policy, totals=Totals.of(policy))
    got = run(TPOLoss(beta=H, tpo_alpha=0.0), policy, num_gold_tokens=0)
    assert got == pytest.approx(preference(sp(-SUMS), -H * sg(-SUMS)), rel=1e-12)


def test_defaults():
    expected = {"loss_type": "sigmoid", "label_smoothing": 0.0}
    cpo = {"beta": 0.1, "cpo_alpha": None, "simpo_gamma": 0.5, "alpha": 0.0}
    assert dataclasses.asdict(CPOLoss()) == expected | cpo
    assert dataclasses.asdict(TPOLoss()) == expected | {"beta": 0.01, "tpo_alpha": 1.0, "tpo_l_gamma": 0.5}
    for loss in (CPOLoss(), TPOLoss()):
        assert (loss.wants_reference, loss.window_pass, loss.scores_prompt, loss.stats) == (False, None, False, ())
    assert not CPOLoss().scores_gold and TPOLoss().scores_gold


def test_equal_completions():
    """ln 2 with slopes of beta / 2; simpo: sp(gamma); simper: 0."""
    for loss_type, value, slope in (
        ("sigmoid", log(2), 0.05),
        ("simpo", sp(0.5), 0.1 * sg(0.5)),
        ("simper", 0, exp(-2)),
    ):
        policy = PairLogps(row([-2.0]), row([-2.0]))
        out = CPOLoss(loss_type=loss_type, cpo_alpha=0.0)(policy, totals=Totals.of(policy)).loss
        out.backward()
        assert out.item() == pytest.approx(value) and grads(policy.chosen) == [pytest.approx(-slope)]
        assert grads(policy.rejected) == [pytest.approx(slope)]


@pytest.mark.parametrize("loss", [CPOLoss, TPOLoss])
def test_what_is_refused(loss):
    with pytest.raises(ValueError, match="loss_type='dpo' is unknown, expected one of: sigmoid, hinge, ipo, "):
        loss(loss_type="dpo")
    with pytest.raises(ValueError, match="beta=0 must be positive$"):
        loss(beta=0)
    for e in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"label_smoothing={e} must be in \[0, 1\]"):
            loss(label_smoothing=e)
    loss(label_smoothing=0.0), loss(label_smoothing=1.0)
