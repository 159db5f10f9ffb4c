"""What of a pair's tokens counts, by hand: LD-DPO, SamPO, WPO, humanline's clip, the entropy of MallowsPO."""

import dataclasses
import math
from math import exp, log

import pytest
import torch

from logratio.losses import DPOLoss, PairLogps, Totals
from logratio.losses.token_ratios import down_sampled, probability

from ._pairs import row, run, sg, sp

# Chosen: -1, hole, -2, -4; reference -2, -3, -8 (r: 1, 1, 4). Rejected: -1, -3; reference -1, -2 (r: 0, -1).
LONG, LONG_REF = [-1.0, math.nan, -2.0, -4.0], [-2.0, -3.0, math.nan, -8.0]
SHORT, SHORT_REF = [-1.0, -3.0], [-1.0, -2.0]


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_ld_alpha_weighs_what_is_longer_than_the_other_side(alpha):
    """Two tokens are shared: r_w = 1 + 1 + 4 alpha, r_l = -1. A hole in the mask is no token."""
    loss = DPOLoss(beta=0.5, ld_alpha=alpha)
    policy = PairLogps(row(LONG), row(SHORT))
    x = 0.5 * (2 + 4 * alpha + 1)
    s = 0.5 * sg(-x)
    expected = (sp(-x), [-s, 0, -s, -alpha * s], [s, s])
    assert run(loss, policy, PairLogps(row(LONG_REF), row(SHORT_REF))) == tuple(pytest.approx(e) for e in expected)
    policy = PairLogps(row(SHORT), row(LONG))
    s = 0.5 * sg(x)
    expected = (sp(x), [-s, -s], [s, 0, s, alpha * s])
    ref = PairLogps(row(SHORT_REF), row(LONG_REF))
    assert run(loss, policy, ref) == tuple(pytest.approx(e) for e in expected)
    metrics = loss(policy, ref, totals=Totals.of(policy)).metrics
    assert metrics["rewards/rejected"].total.item() == 1 + 2 * alpha  # as the loss has it
    assert metrics["logps/rejected"].total.item() == -7


def test_ld_alpha_does_not_change_the_nll():
    loss = DPOLoss(loss_type="irpo", beta=0.5, ld_alpha=0.0)
    policy, ref = PairLogps(row(LONG), row(SHORT)), PairLogps(row(LONG_REF), row(SHORT_REF))
    assert run(loss, policy, ref)[0] == pytest.approx(sp(-1.5) + 7 / 3)


def test_down_sampling_takes_as_many_tokens_at_even_distances():
    """Of LONG's three tokens the second and the last, after a hole: r_w = 1 + 4, r_l = -1."""
    loss = DPOLoss(loss_type=("sigmoid", "irpo"), beta=0.5, down_sample=True)
    policy, ref = PairLogps(row(LONG), row(SHORT)), PairLogps(row(LONG_REF), row(SHORT_REF))
    s = 0.5 * sg(-3.0)
    value, up, down = run(loss, policy, ref)
    assert value == pytest.approx(2 * sp(-3.0) + 7 / 3)  # the NLL is of all three
    assert up == pytest.approx([-1 / 3, 0, -1 / 3 - 2 * s, -1 / 3 - 2 * s]) and down == pytest.approx([2 * s, 2 * s])
    swapped = PairLogps(row(SHORT), row(LONG)), PairLogps(row(SHORT_REF), row(LONG_REF))
    loss = DPOLoss(beta=0.5, down_sample=True)
    metrics = loss(*swapped, totals=Totals.of(swapped[0])).metrics
    assert metrics["rewards/rejected"].total.item() == 2.5 and metrics["logps/rejected"].total.item() == -7
    free = DPOLoss(beta=0.5, down_sample=True, reference_free=True)
    assert run(free, PairLogps(row(LONG), row(SHORT)), None)[0] == pytest.approx(sp(0.5 * (6 - 4)))


def test_down_sampling_spreads_what_it_takes():
    """Of 7 tokens 3: places 3, 5, 7; of 5 tokens 4: all but the first; of any none, beside an empty completion."""
    for many, few, places in ((7, 3, [3, 5, 7]), (5, 4, [2, 3, 4, 5]), (4, 0, []), (3, 3, [1, 2, 3]), (6, 1, [6])):
        sides = row([-1.0] * many), row([-1.0] * few + [math.nan])
        for order in (sides, sides[::-1]):
            both = down_sampled(order)
            longer, shorter = both if order is sides else both[::-1]
            assert (longer.completion_mask[0].nonzero().flatten() + 1).tolist() == places
            assert shorter.completion_mask.sum() == few


def test_weighting_by_hand():
    """Weights: exp of the mean of log p - log sum p^2, here of 1 and -2 (or -1), and of 0.5; no gradient."""
    policy = PairLogps(row([-1.0, math.nan, -4.0], [-2.0, math.nan, -2.0]), row([-1.0], [-1.5]))
    ref = PairLogps(row([-2.0, math.nan, -4.0]), row([-2.0]))
    loss = DPOLoss(loss_type="cdpo", label_smoothing=0.2, beta=0.5, use_weighting=True)
    heavier = PairLogps(row([-1.0, math.nan, -4.0], [-2.0, math.nan, -3.0]), row([-1.0], [-1.5]))
    for p, w in ((policy, exp(-1 / 2) * exp(0.5)), (heavier, exp(0.0) * exp(0.5))):
        s = -w * 0.5 * (0.8 - 0.5)  # x = 0
        value, up, down = run(loss, p, ref)
        assert value == pytest.approx(w * log(2), rel=1e-12)
        assert up == pytest.approx([s, 0, s], rel=1e-12) and down == pytest.approx([-s], rel=1e-12)
    assert loss.stats == ("log_sum_p2",)


def test_averages_where_a_side_is_empty():
    """Its average is 0: D = 3 / 2 or -3 / 2, with a slope for the other side alone."""
    loss, none = DPOLoss(loss_type="ipo", beta=0.5), [math.nan]
    policy, ref = PairLogps(row([-1.0, -2.0]), row(none)), PairLogps(row([-4.0, -2.0]), row(none))
    assert run(loss, policy, ref) == (0.25, [0.5, 0.5], [0])
    policy, ref = PairLogps(row(none), row([-1.0, -2.0])), PairLogps(row(none), row([-4.0, -2.0]))
    assert run(loss, policy, ref) == (6.25, [0], [2.5, 2.5])


def test_weighting_where_a_side_is_empty():
    """exp of no tokens: 1."""
    assert probability(row([-1.0, math.nan], [-1.5, math.nan])).tolist() == [exp(0.5)]
    policy = PairLogps(row([-1.0], [-1.5]), row([math.nan], [math.nan]))
    ref = PairLogps(row([-1.0]), row([math.nan]))
    value, up, down = run(DPOLoss(use_weighting=True), policy, ref)
    assert value == pytest.approx(exp(0.5) * log(2)) and up == [pytest.approx(-0.05 * exp(0.5))] and down == [0]


def test_weighting_needs_the_sum_of_squares():
    policy = PairLogps(row([-1.0], [-1.5]), row([-1.0]))
    with pytest.raises(ValueError, match="this loss needs the policy's log_sum_p2 of every token, which is None"):
        DPOLoss(use_weighting=True)(policy, policy, totals=Totals.of(policy))


def test_humanline_clips_the_ratio_of_each_token_and_stops_its_gradient():
    """Ratios 3, -0.5, -2 and a hole, clipped to -1 and 1.5: 0 in sum; of the rejected 1.5, which is just inside."""
    policy = PairLogps(row([-1.0, -2.0, -4.0, math.nan]), row([-1.0]))
    ref = PairLogps(row([-4.0, -1.5, -2.0, math.nan]), row([-2.5]))
    value, up, down = run(DPOLoss(beta=0.5, humanline_clip=(-1.0, 1.5)), policy, ref)
    assert value == pytest.approx(sp(0.75), rel=1e-12)
    assert up == [0, pytest.approx(-0.5 * sg(0.75)), 0, 0] and down == [pytest.approx(0.5 * sg(0.75))]
    plain = run(DPOLoss(beta=0.5), policy, ref)[0]
    assert run(DPOLoss(beta=0.5, humanline_clip=(-9.0, 9.0)), policy, ref)[0] == plain == pytest.approx(sp(0.5))
    for one_side in ((-9.0, 0.0), (0.0, 9.0)):
        assert DPOLoss(humanline_clip=one_side).humanline_clip == one_side
    both = run(DPOLoss(loss_type=("sigmoid", "sft"), beta=0.5, humanline_clip=(-1.0, 1.5)), policy, ref)[0]
    assert both == pytest.approx(sp(0.75) + 7 / 3)  # the log-likelihood is the policy's own
    shorter = PairLogps(row([-4.0]), row([-2.5]))
    with pytest.raises(ValueError, match=r"ref must have the policy's rows and tokens, got \[1, 1\] for \[1, 4\]"):
        DPOLoss(humanline_clip=(-1.0, 1.5))(policy, shorter, totals=Totals.of(policy))


def test_mallows_asks_for_the_references_entropy():
    """Means over tokens 2 and 1, over sides 1.5; where one side is empty, the other's; no gradient."""
    loss = DPOLoss(loss_type=("sft", "mallows"), loss_weights=(0.0, 1.0), mallows_max_entropy=1.5 * exp(2), beta=0.5)
    assert loss.ref_stats == ("entropy",) and loss.stats == ()
    policy = PairLogps(row([-1.0, math.nan, -1.0]), row([-2.0]))

    def ref(*entropies: list[float]) -> PairLogps:
        sides = (row([-1.0, math.nan, -2.0]), row([-1.0]))
        told = [torch.tensor([h], dtype=torch.float64, requires_grad=True) for h in entropies]
        return PairLogps(*(dataclasses.replace(x, entropy=h) for x, h in zip(sides, told, strict=True)))

    x = 0.5 * 2 * 0.58
    both = ref([1.0, math.nan, 3.0], [1.0])
    assert run(loss, policy, both)[0] == pytest.approx(sp(-x))
    sampled = dataclasses.replace(loss, down_sample=True)  # entropies are of all tokens, the margin is the same
    assert run(sampled, policy, both)[0] == pytest.approx(sp(-x))
    assert both.chosen.entropy.grad is None and both.rejected.entropy.grad is None
    empty = row([math.nan])
    lone = PairLogps(policy.chosen, empty)
    surer = dataclasses.replace(empty, entropy=torch.zeros(1, 1, dtype=torch.float64))
    x = 0.5 * 1 * 0.29 * (2 + log(1.5 / 2))
    assert run(loss, lone, PairLogps(both.chosen, surer))[0] == pytest.approx(sp(-x))
    with pytest.raises(ValueError, match="^this loss needs the reference's entropy of every token, which is None$"):
        loss(policy, PairLogps(both.chosen, row([-1.0])), totals=Totals.of(policy))
