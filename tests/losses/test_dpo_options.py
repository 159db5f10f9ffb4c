"""DPO's options by hand: f-divergences, several losses at once, what is refused, and the metrics."""

import dataclasses
import math
from math import exp, log

import pytest
import torch

from logratio.losses import DPO_TYPES, F_DIVERGENCES, CompletionLogps, DPOLoss, PairLogps, Totals, TPOLoss
from logratio.losses.divergences import MAX_EXPONENT

from ._pairs import ratios, row, run, sg, sp

DIVERGENT = {"ipo_sum", "sba", "sigmoid", "hinge", "ipo", "sigmoid_norm", "robust", "exo_pair", "discopop", "sft"}


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
