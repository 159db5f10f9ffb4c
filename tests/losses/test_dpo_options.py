"""DPO's options by hand: f-divergences, LD-DPO, WPO, several losses at once, what is refused, and the metrics."""

import dataclasses
import math
from math import exp, log

import pytest
import torch

from logratio.losses import DPO_TYPES, F_DIVERGENCES, CompletionLogps, DPOLoss, PairLogps, Totals, TPOLoss
from logratio.losses.divergences import MAX_EXPONENT
from logratio.losses.token_ratios import down_sampled, probability

DIVERGENT = {"ipo_sum", "sba", "sigmoid", "hinge", "ipo", "sigmoid_norm", "robust", "exo_pair", "discopop", "sft"}


def sp(x: float) -> float:
    return math.log1p(exp(x))


def sg(x: float) -> float:
    return 1 / (1 + exp(-x))


def row(logps: list[float], stat: list[float] | None = None) -> CompletionLogps:
    """One completion; NaN is a hole in the mask."""
    values = torch.tensor([logps], dtype=torch.float64, requires_grad=True)
    log_sum_p2 = None if stat is None else torch.tensor([stat], dtype=torch.float64)
    return CompletionLogps(values, ~values.detach().isnan(), log_sum_p2=log_sum_p2)


def ratios(r_w: float, r_l: float) -> tuple[PairLogps, PairLogps]:
    """One token each; the reference's log-probs are -1."""
    return PairLogps(row([r_w - 1]), row([r_l - 1])), PairLogps(row([-1.0]), row([-1.0]))


def run(loss: DPOLoss, policy: PairLogps, ref: PairLogps) -> tuple[float, list[float], list[float]]:
    """(value, slopes of the chosen's tokens, of the rejected's) where this is the whole step."""
    value = loss(policy, ref, totals=Totals.of(policy, loss.collect(policy, ref))).loss
    value.backward()
    return value.item(), *(x.per_token_logps.grad.flatten().tolist() for x in (policy.chosen, policy.rejected))


def test_defaults():
    assert dataclasses.asdict(DPOLoss()) == {
        "beta": 0.1,
        "loss_type": ("sigmoid",),
        "loss_weights": None,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "down_sample": False,
        "use_weighting": False,
        "discopop_tau": 0.05,
        "irpo_alpha": 1.0,
        "dpop_lambda": 50.0,
        "cal_dpo_coef": 0.5,
        "r_dpo_alpha": 0.1,
        "chi_po_r_max": 10.0,
        "rainbow_mu": 0.25,
        "rainbow_gamma": 0.1,
        "beta_dpo_coef": 0.6,
        "beta_dpo_momentum": 0.9,
        "reference_free": False,
        "humanline_clip": None,
        "alpha_dpo_coef": 0.1,
        "dr_dpo_beta": 1.0,
        "odpo_alpha": 1.0,
        "modpo_weight": 0.5,
        "rejected_weight": 0.95,
        "h_dpo_alpha": 0.95,
        "focal_po_gamma": 0.05,
        "c2_dpo_lambda": 2e-4,
        "sba_lambda": -0.5,
        "mallows_phi": 0.29,
        "mallows_max_entropy": log(128256),
    }
    loss = DPOLoss()
    assert loss.ref_stats == ()
    assert (loss.stats, loss.scores_prompt, loss.scores_gold, loss.wants_reference) == ((), False, False, True)


# f(r), f'(r) at r = 2 and r = -1
SCORES = {
    "reverse_kl": ({}, (2, 1), (-1, 1)),
    "forward_kl": ({}, (1 - exp(-2), exp(-2)), (1 - exp(1), exp(1))),
    "js_divergence": ({}, (log(2) + log(sg(2)), sg(-2)), (log(2) + log(sg(-1)), sg(1))),
    "alpha_divergence": ({}, (2 - 2 * exp(-1), exp(-1)), (2 - 2 * exp(0.5), exp(0.5))),
    "alpha 1": ({"f_alpha_divergence_coef": 1.0}, (2, 1), (-1, 1)),
    "alpha 0": ({"f_alpha_divergence_coef": 0.0}, (1 - exp(-2), exp(-2)), (1 - exp(1), exp(1))),
    "alpha 3": ({"f_alpha_divergence_coef": 3.0}, ((exp(4) - 1) / 2, exp(4)), ((exp(-2) - 1) / 2, exp(-2))),
}


@pytest.mark.parametrize("name", SCORES)
def test_f_divergences_by_hand(name):
    """-log sigmoid((f(r_w) - f(r_l)) / 2); the metrics stay those of the log-ratios."""
    options, (f_w, slope_w), (f_l, slope_l) = SCORES[name]
    kind = name if name in F_DIVERGENCES else "alpha_divergence"
    policy, ref = ratios(2.0, -1.0)
    loss = DPOLoss(beta=0.5, f_divergence_type=kind, **options)
    x = 0.5 * (f_w - f_l)
    expected = (sp(-x), [-0.5 * slope_w * sg(-x)], [0.5 * slope_l * sg(-x)])
    assert run(loss, policy, ref) == tuple(pytest.approx(e, rel=1e-12) for e in expected)
    metrics = loss(policy, ref, totals=Totals.of(policy)).metrics
    assert metrics["rewards/chosen"].total.item() == 1.0 and metrics["rewards/rejected"].total.item() == -0.5


@pytest.mark.parametrize(
    ("options", "r", "limit"),
    [
        ({"f_divergence_type": "forward_kl"}, -50.0, 1 - exp(40)),
        ({"f_divergence_type": "alpha_divergence"}, -100.0, 2 - 2 * exp(40)),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0}, 50.0, exp(40) - 1),
    ],
)
def test_exponents_stop_at_forty(options, r, limit):
    """Beyond there is no slope; just before there is."""
    assert MAX_EXPONENT == 40
    loss = DPOLoss(loss_type="ipo", beta=0.5, **options)
    value, (up,), _ = run(loss, *ratios(r, 0.0))
    assert value == pytest.approx((limit - 1) ** 2, rel=1e-12) and up == 0
    value, (up,), _ = run(loss, *ratios(r * 39 / 50, 0.0))
    assert 0 < value < (limit - 1) ** 2 and abs(up) > 1e16


def test_which_variants_take_another_divergence():
    for name in DPO_TYPES:
        smoothing = {"label_smoothing": 0.1} if name in DPO_TYPES.readers("label_smoothing") else {}
        options = {"loss_type": name, "f_divergence_type": "js_divergence"} | smoothing
        if name == "sft":  # reads none, but keeps its meaning beside those that do
            DPOLoss(loss_type=("sigmoid", "sft"), f_divergence_type="js_divergence")
        elif name in DIVERGENT:
            assert DPOLoss(**options).loss_type == (name,)
        else:
            with pytest.raises(ValueError, match=f"^f_divergence_type=js_divergence is not read by loss_type {name}; "):
                DPOLoss(**options)
            DPOLoss(**options | {"f_divergence_type": "reverse_kl"})
    with pytest.raises(ValueError, match="is not defined for cdpo, sppo_hard$"):
        DPOLoss(loss_type=("cdpo", "sigmoid", "sppo_hard"), f_divergence_type="forward_kl")


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


@pytest.mark.parametrize(
    ("weights", "numbers"), [(None, (1, 1, 1)), ((1.0, 1.0, 1.0), (1, 1, 1)), ((0.8, 0.0, -3.0), (0.8, 0, -3))]
)
def test_several_losses_are_added_up(weights, numbers):
    """sigmoid, hinge and sppo_hard at beta = 1/2: x = 3/2."""
    loss = DPOLoss(loss_type=("sigmoid", "hinge", "sppo_hard"), loss_weights=weights, beta=0.5)
    a, b, c = numbers
    value, up, down = run(loss, *ratios(1.5, -0.2))
    x = 0.5 * 1.7
    assert value == pytest.approx(a * sp(-x) + b * (1 - x) + c * (0.5**2 + 0.8**2), rel=1e-12)
    assert up == [pytest.approx(-a * 0.5 * sg(-x) - b * 0.5 + c * 2 * 0.5, rel=1e-12)]
    assert down == [pytest.approx(a * 0.5 * sg(-x) + b * 0.5 + c * 2 * 0.8, rel=1e-12)]


def test_one_name_is_a_tuple_of_one():
    assert DPOLoss(loss_type="ipo") == DPOLoss(loss_type=("ipo",)) and DPOLoss(loss_type="ipo").loss_type == ("ipo",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "best"}, "loss_type='best' is unknown, expected one of: sigmoid, hinge, ipo, cdpo, "),
        ({"loss_type": ("ipo", "best")}, "loss_type='best' is unknown"),
        ({"loss_type": ()}, "^loss_type must name at least one variant$"),
        ({"loss_weights": (1.0, 2.0)}, r"loss_weights=\(1.0, 2.0\) must have one number for each of \('sigmoid',\)"),
        ({"loss_type": ("ipo", "sft"), "loss_weights": (1.0,)}, r"each of \('ipo', 'sft'\)"),
        ({"f_divergence_type": "kl"}, "f_divergence_type='kl' is unknown, expected one of: reverse_kl, forward_kl, "),
        ({"beta": 0.0}, "beta=0.0 must be positive$"),
        ({"discopop_tau": 0.0}, "discopop_tau=0.0 must be positive$"),
        ({"chi_po_r_max": -1.0}, "chi_po_r_max=-1.0 must be positive$"),
        ({"label_smoothing": -0.1}, r"label_smoothing=-0.1 must be in \[0, 1\]"),
        ({"label_smoothing": 1.1}, r"label_smoothing=1.1 must be in \[0, 1\]"),
        ({"label_smoothing": math.nan}, "label_smoothing=nan must be finite$"),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting weighs pairs, which aot takes apart; leave one"),
        (
            {"loss_type": ("ipo", "dr_dpo"), "use_weighting": True},
            "use_weighting weighs pairs, which dr_dpo takes apart",
        ),
        (
            {"loss_type": ("sigmoid", "rainbow"), "down_sample": True},
            "^down_sample samples the tokens that rainbow averages; leave one of them out$",
        ),
        (
            {"loss_type": "ipo", "down_sample": True},
            "is an option of all but ipo, sigmoid_norm, rainbow, alpha_dpo, sft$",
        ),
        (
            {"ld_alpha": 0.0, "down_sample": True},
            "^down_sample and ld_alpha both shorten the longer completion; leave one of them out$",
        ),
        ({"sba_lambda": -1.0, "loss_type": "sba"}, r"^sba_lambda=-1.0 must be in \(-1, 3\]$"),
        (
            {"loss_type": ("sigmoid", "mallows"), "reference_free": True},
            "^mallows reads the entropy of what reference_free leaves out; leave one of them out$",
        ),
        ({"humanline_clip": (0.1, 1.0)}, r"^humanline_clip=\(0.1, 1.0\) must be two numbers around 0, as -1 1.5$"),
        ({"humanline_clip": (0.0, 0.0)}, "must be two numbers around 0"),
        ({"humanline_clip": (-1.0,)}, "must be two numbers around 0"),
        ({"humanline_clip": (-1.0, 1.0, 1.5)}, "must be two numbers around 0"),
        ({"humanline_clip": (-1.0, 1.5), "loss_type": "sft"}, "is not read by loss_type sft; leave it out"),
        ({"humanline_clip": (-1.0, math.nan)}, "must be finite$"),
        (
            {"humanline_clip": (-1.0, 1.0), "reference_free": True},
            "^humanline_clip clips what reference_free leaves out",
        ),
        ({"modpo_weight": 0.0, "loss_type": "modpo"}, r"modpo_weight=0.0 must be in \(0, 1\]$"),
        ({"rejected_weight": 0.5}, "is an option of dpo_shift, bpo$"),
        ({"loss_type": ("ipo", "aot_unpaired"), "use_weighting": True}, "leave one of them out"),
        ({"loss_type": "exo_pair"}, r"exo_pair needs label_smoothing above 0 \(1e-3, say\), got 0.0"),
        ({"loss_type": ("ipo", "exo_pair"), "label_smoothing": 1.0}, "exo_pair needs label_smoothing .* got 1.0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "robust needs label_smoothing below 0.5, got 0.5"),
    ],
    ids=str,
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DPOLoss(**options)


def test_without_a_reference_the_log_probs_count_by_themselves():
    """log p -1 and -3 beside -2: 0.5 (-4 + 2)."""
    policy, loss = PairLogps(row([-1.0, -3.0]), row([-2.0])), DPOLoss(beta=0.5, reference_free=True)
    value = loss(policy, totals=Totals.of(policy, loss.collect(policy))).loss
    value.backward()
    assert value.item() == pytest.approx(sp(1.0)) and not loss.wants_reference
    assert policy.chosen.per_token_logps.grad.tolist() == [pytest.approx([-0.5 * sg(1.0)] * 2)]
    other = PairLogps(row([-9.0] * 2), row([-7.0]))
    assert run(loss, policy, other)[0] == value.item()  # a reference that is there is not read
    with pytest.raises(ValueError, match="^DPO compares with the reference's log-probs: `ref` is None, which needs"):
        DPOLoss()(policy, totals=Totals.of(policy))


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


@pytest.mark.parametrize("loss_type", ["odpo", "modpo", "sppo"])
def test_margins_are_asked_for_by_name(loss_type):
    policy, ref = ratios(1.0, 0.0)
    assert DPOLoss(loss_type=("sigmoid", loss_type)).wants_margin and not DPOLoss().wants_margin
    with pytest.raises(ValueError, match=f"^loss_type {loss_type} needs the pairs' margins, policy.margin is None$"):
        DPOLoss(loss_type=loss_type)(policy, ref, totals=Totals.of(policy))
    with pytest.raises(ValueError, match=r"^margin must be \[1\], one number a pair, got \[2\]$"):
        dataclasses.replace(policy, margin=torch.zeros(2))
    margin = torch.ones(1, dtype=torch.float64, requires_grad=True)
    run(DPOLoss(loss_type=loss_type), dataclasses.replace(policy, margin=margin), ref)
    assert margin.grad is None


def test_what_is_just_allowed():
    for options in (
        {"loss_type": "cdpo", "label_smoothing": 1.0},
        {"loss_type": "exo_pair", "label_smoothing": 0.999},
        {"loss_type": "robust", "label_smoothing": 0.499},
        {"loss_type": ("ipo", "sigmoid"), "use_weighting": True, "ld_alpha": 1.0},
        {"loss_type": "beta_dpo", "use_weighting": True},
        {"loss_type": ("r_dpo", "sft"), "down_sample": True, "use_weighting": True, "humanline_clip": (-1.0, 1.0)},
        {"humanline_clip": (0.0, 1.0)},
        {"loss_type": "modpo", "modpo_weight": 1.0},
    ):
        DPOLoss(**options)


def test_a_reference_of_other_rows_is_refused_and_of_other_tokens_is_not():
    chosen, rejected = (CompletionLogps(torch.zeros(2, n), torch.ones(2, n).bool()) for n in (1, 3))
    ref = PairLogps(row([-1.0, -2.0]), row([-1.0] * 4))
    with pytest.raises(ValueError, match=r"ref must have the policy's rows, got \[1, 2\] for \[2, 1\]"):
        DPOLoss()(PairLogps(chosen, rejected), ref, totals=Totals(num_sequences=2, num_tokens=4))
    policy, ref = PairLogps(row([-1.0]), row([-2.0])), PairLogps(row([-1.5, -1.5]), row([math.nan, -2.0]))
    assert run(DPOLoss(beta=0.5), policy, ref)[0] == pytest.approx(sp(-1.0))


def test_metrics_of_several_pairs():
    """Rewards 0.5 over 0.1; a tie, which is no win; -0.2 over 0.3; nothing scored."""
    hole = [math.nan]
    columns = {
        "w": [-1.0, -2.0, -3.0],
        "l": [-4.0, -2.0, -1.0],
        "ref w": [-6.0, -2.0, -1.0],
        "ref l": [-5.0, -2.0, -4.0],
    }
    sides = [
        CompletionLogps(torch.tensor([[x] for x in values + hole]), torch.tensor([[True]] * 3 + [[False]]))
        for values in columns.values()
    ]
    policy, ref = PairLogps(*sides[:2]), PairLogps(*sides[2:])
    metrics = DPOLoss()(policy, ref, totals=Totals.of(policy)).metrics
    assert {name: mean.total.item() for name, mean in metrics.items()} == pytest.approx(
        {
            "rewards/chosen": 0.3,
            "rewards/rejected": 0.4,
            "rewards/accuracies": 1.0,
            "rewards/margins": -0.1,
            "logps/chosen": -6.0,
            "logps/rejected": -7.0,
        }
    )
    assert {mean.count.item() for mean in metrics.values()} == {3}


def test_token_metrics_of_pairs():
    """The entropy of all completions' tokens, the accuracy of the chosen's; a third completion counts where it is."""
    sides = [
        CompletionLogps(
            torch.full((2, 2), -1.0),
            torch.tensor([[True, True], [True, False]]),
            entropy=torch.tensor([[1.0, 2.0], [3.0, math.nan]]) * size,
            is_top1=torch.tensor([[top, False], [True, True]]),
        )
        for size, top in ((1, True), (10, False), (100, False))
    ]
    policy = PairLogps(*sides[:2])
    metrics = DPOLoss()(policy, policy, totals=Totals.of(policy)).metrics
    assert (metrics["entropy"].value, metrics["entropy"].count.item()) == (66 / 6, 6)
    assert metrics["mean_token_accuracy"].value == pytest.approx(2 / 3)
    three = PairLogps(*sides[:2], gold=sides[2])
    metrics = TPOLoss()(three, totals=Totals.of(three)).metrics
    assert (metrics["entropy"].value, metrics["mean_token_accuracy"].value) == (666 / 9, pytest.approx(2 / 3))


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_a_divergence_scores_the_reference_itself_with_0(name):
    """A constant would cancel in every margin, and still be wrong."""
    score = F_DIVERGENCES[name](torch.zeros(1, dtype=torch.float64), DPOLoss(f_divergence_type=name))
    assert score.item() == pytest.approx(0.0, abs=1e-15)
