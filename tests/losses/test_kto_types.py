"""KTO without its KL term, and BCO with its running mean, by hand; the step-wide pieces and what is refused."""

import dataclasses
import math
from math import exp

import pytest
import torch
from torch import Tensor

from logratio.losses import KTO_TYPES, CompletionLogps, KTOLoss, Totals

# Log-ratios 3 (two tokens and a hole), -1 (one token), 0.5 (one token), and of a row with nothing scored.
LOGPS = [[-1.0, math.nan, -2.0], [-4.0, math.nan, math.nan], [-1.0, math.nan, math.nan], [math.nan] * 3]
REF = [[-2.0, math.nan, -4.0], [-3.0, math.nan, math.nan], [-1.5, math.nan, math.nan], [math.nan] * 3]
RATIOS = [3.0, -1.0, 0.5]
LABEL = torch.tensor([True, False, False, True])
WEIGHTS = {"desirable_weight": 0.7, "undesirable_weight": 1.9}


def sp(x: float) -> float:
    return math.log1p(exp(x))


def sg(x: float) -> float:
    return 1 / (1 + exp(-x))


def logps(rows: list[list[float]]) -> CompletionLogps:
    values = torch.tensor(rows, dtype=torch.float64)
    return CompletionLogps(values.requires_grad_(), ~values.detach().isnan())


def run(loss: KTOLoss, collected: Tensor | None, state: dict[str, float] | None = None) -> tuple[float, Tensor]:
    """(value, gradient) of these four examples in a step of ten."""
    policy, ref = logps(LOGPS), logps(REF)
    totals = Totals(num_sequences=10, num_tokens=77, collected=collected, state=state or {})
    value = loss(policy, ref, LABEL, totals=totals).loss
    value.backward()
    assert ref.per_token_logps.grad is None
    return value.item(), policy.per_token_logps.grad


def slopes(*of_rows: float) -> Tensor:
    """The gradient with these slopes in each scored token of the rows."""
    mask = ~torch.tensor(LOGPS, dtype=torch.float64).isnan()
    return torch.tensor([*of_rows, 0.0], dtype=torch.float64)[:, None] * mask / 10


def test_defaults():
    assert dataclasses.asdict(KTOLoss()) == {
        "beta": 0.1,
        "loss_type": "kto",
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "humanline_clip": None,
    }
    assert KTOLoss().wants_reference and KTOLoss().stats == ()


def test_which_pass_each_variant_needs():
    passes = {name: KTOLoss(loss_type=name).window_pass for name in KTO_TYPES}
    assert passes == {"kto": "mismatched", "apo_zero_unpaired": None, "bco": "own"}


@pytest.mark.parametrize("collected", [None, torch.tensor([9.0])], ids=["none", "given"])
def test_apo_zero_unpaired_by_hand(collected):
    """kto at z = 0, whatever is collected."""
    value, grad = run(KTOLoss(loss_type="apo_zero_unpaired", beta=0.5, **WEIGHTS), collected)
    assert value == pytest.approx((0.7 * sg(-1.5) + 1.9 * (sg(-0.5) + sg(0.25))) / 10, rel=1e-12)
    bumps = [sg(x) * sg(-x) for x in (1.5, 0.5, 0.25)]
    expected = slopes(-0.35 * bumps[0], 0.95 * bumps[1], 0.95 * bumps[2])
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)


def test_kto_by_hand_with_holes_and_other_rows():
    """z = max(0, mean of -1, 4, 0) = 1; sum / 10 whatever the weights."""
    loss = KTOLoss(beta=0.5, **WEIGHTS)
    value, grad = run(loss, torch.tensor([-1.0, 4.0, 0.0], dtype=torch.float64))
    assert value == pytest.approx((0.7 * sg(-1.0) + 1.9 * (sg(-1.0) + sg(-0.25))) / 10, rel=1e-12)
    bumps = [sg(x) * sg(-x) for x in (1.0, 1.0, 0.25)]
    expected = slopes(-0.35 * bumps[0], 0.95 * bumps[1], 0.95 * bumps[2])
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)


# At beta = 1/2, rewards 1.5, -0.5, 0.25; of the whole step, with another example of reward 2.25 and an empty one.
COLLECTED = torch.tensor([3.0, 4.5, -1.0, math.nan, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("state", "delta"),
    [({}, 3.5 / 4), ({"reward_sum": 5.0, "num_examples": 6.0}, 8.5 / 10), ({"reward_sum": -8.5}, -5 / 4)],
)
def test_bco_by_hand(state, delta):
    """sp(-(reward - delta)) of desirable, sp(reward - delta) of others; delta is a constant."""
    value, grad = run(KTOLoss(loss_type="bco", beta=0.5, **WEIGHTS), COLLECTED, state)
    up, down = 1.5 - delta, (-0.5 - delta, 0.25 - delta)
    assert value == pytest.approx((0.7 * sp(-up) + 1.9 * (sp(down[0]) + sp(down[1]))) / 10, rel=1e-12)
    expected = slopes(-0.35 * sg(-up), 0.95 * sg(down[0]), 0.95 * sg(down[1]))
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)


def test_bco_at_the_reference():
    """ln 2 each, with slopes of beta / 2."""
    policy = logps([[-1.0], [-2.0]])
    loss = KTOLoss(loss_type="bco")
    totals = Totals.of(policy, loss.collect(policy, policy))
    value = loss(policy, policy, torch.tensor([True, False]), totals=totals).loss
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    assert policy.per_token_logps.grad.flatten().tolist() == pytest.approx([-0.025, 0.025])


def test_bco_does_not_saturate():
    """The wrong way by 1e4 nats, in float32: slope beta."""
    policy = CompletionLogps(torch.tensor([[-1e4]], requires_grad=True), torch.ones(1, 1, dtype=torch.bool))
    totals = Totals(num_sequences=1, num_tokens=1, collected=torch.zeros(1))
    ref = CompletionLogps(torch.zeros(1, 1), policy.completion_mask)
    value = KTOLoss(loss_type="bco")(policy, ref, torch.tensor([True]), totals=totals).loss
    value.backward()
    assert value.dtype == torch.float32 and value.item() == 1e3
    assert policy.per_token_logps.grad.item() == pytest.approx(-0.1)


def test_the_state_of_bco_is_the_sum_and_number_of_rewards():
    loss = KTOLoss(loss_type="bco", beta=0.5)
    known = {"reward_sum": 5.0, "num_examples": 6.0}
    first = loss.advance(Totals(num_sequences=5, num_tokens=9, collected=COLLECTED))
    assert first == {"reward_sum": 3.5, "num_examples": 4.0}
    assert loss.advance(Totals(num_sequences=5, num_tokens=9, collected=COLLECTED, state=known)) == {
        "reward_sum": 8.5,
        "num_examples": 10.0,
    }
    nothing = Totals(num_sequences=1, num_tokens=0, collected=torch.tensor([math.nan]), state=known)
    assert loss.advance(nothing) == known
    for loss_type in ("kto", "apo_zero_unpaired"):
        assert KTOLoss(loss_type=loss_type).advance(nothing) is known


def test_bco_before_anything_was_seen():
    """Nothing scored in the first step: delta is 0."""
    loss = KTOLoss(loss_type="bco", beta=0.5)
    value, _ = run(loss, torch.tensor([math.nan], dtype=torch.float64))
    assert value == pytest.approx((sp(-1.5) + sp(-0.5) + sp(0.25)) / 10, rel=1e-12)
    half = {"reward_sum": 0.2, "num_examples": 0.5}  # less than one example counts as one
    value, _ = run(loss, torch.tensor([math.nan], dtype=torch.float64), half)
    assert value == pytest.approx((sp(-1.3) + sp(-0.7) + sp(0.05)) / 10, rel=1e-12)


def test_a_row_with_nothing_scored_has_no_loss_whatever_the_reference_has():
    policy, ref = logps([[math.nan]]), logps([[-5.0]])
    for loss_type in KTO_TYPES:
        loss = KTOLoss(loss_type=loss_type)
        value = loss(policy, ref, LABEL[:1], totals=Totals.of(policy, torch.tensor([1.0]).double())).loss
        value.backward()
        assert value.item() == 0 and policy.per_token_logps.grad.item() == 0


def test_what_is_collected_gets_no_gradient():
    collected = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    policy = logps([[-1.0]])
    out = KTOLoss()(policy, logps([[-2.0]]), LABEL[:1], totals=Totals.of(policy, collected))
    out.loss.backward()
    assert collected.grad is None and not any(mean.total.requires_grad for mean in out.metrics.values())


def test_what_each_variant_collects():
    policy, ref = logps(LOGPS), logps(REF)
    own = KTOLoss(loss_type="bco").collect(policy, ref)
    assert own[:3].tolist() == RATIOS and own[3].isnan() and not own.requires_grad
    mismatched = KTOLoss().collect(policy, ref)
    assert mismatched.tolist() == [*RATIOS, 0.0] and not mismatched.requires_grad


def test_only_kto_has_a_kl_among_its_metrics():
    policy, ref = logps(LOGPS), logps(REF)
    totals = Totals.of(policy, torch.tensor([2.0, 4.0], dtype=torch.float64))
    names = {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"}
    for loss_type in KTO_TYPES:
        metrics = KTOLoss(loss_type=loss_type, beta=0.5)(policy, ref, LABEL, totals=totals).metrics
        assert set(metrics) == (names | {"kl"} if loss_type == "kto" else names)
        means = {name: (metrics[name].total.item(), metrics[name].count.item()) for name in names}
        assert means == {
            "rewards/chosen": (1.5, 1),
            "rewards/rejected": (-0.25, 2),
            "logps/chosen": (-3.0, 1),
            "logps/rejected": (-5.0, 2),
        }
    kl = KTOLoss(beta=0.5)(policy, ref, LABEL, totals=totals).metrics["kl"]
    assert (kl.total.item(), kl.count.item()) == (3.0, 1)
    empty = logps([[math.nan]])
    kl = KTOLoss()(empty, empty, LABEL[:1], totals=totals).metrics["kl"]
    assert (kl.total.item(), kl.count.item()) == (0.0, 0)  # a micro-batch without an example


def test_what_is_refused():
    with pytest.raises(ValueError, match="loss_type='bce' is unknown, expected one of: kto, apo_zero_unpaired, bco"):
        KTOLoss(loss_type="bce")
    with pytest.raises(ValueError, match="beta=-1 must be positive$"):
        KTOLoss(beta=-1)
    policy, ref = logps(LOGPS), logps(REF)
    with pytest.raises(ValueError, match="bco shifts rewards by their running mean: it needs the step's in totals.col"):
        KTOLoss(loss_type="bco")(policy, ref, LABEL, totals=Totals.of(policy))
    narrow = logps(REF[:1])
    with pytest.raises(ValueError, match=r"ref must have the policy's rows, got \[1, 3\] for \[4, 3\]"):
        KTOLoss()(policy, narrow, LABEL, totals=Totals.of(policy, torch.zeros(1)))
    wide = logps([[math.nan, *row] for row in REF])  # other tokens are no matter
    totals = Totals.of(policy, torch.zeros(1))
    expected = KTOLoss()(policy, ref, LABEL, totals=totals).loss
    assert KTOLoss()(policy, wide, LABEL, totals=totals).loss == expected
    assert KTOLoss().collect(policy, wide).tolist() == [*RATIOS, 0.0]
