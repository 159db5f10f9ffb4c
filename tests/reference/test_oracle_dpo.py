"""The oracle's DPO family against numbers worked out by hand; test_oracle_dpo_laws.py has the identities."""

from math import atan, exp, log, pi, sqrt

import pytest
import torch
from torch import tensor

from logratio.reference import oracle

LN2, LN3, LN6 = log(2), log(3), log(6)
REF_W, REF_L = [-3.0, -4.0], [-5.0]


def steps(*sequences: list[float]) -> list[torch.Tensor]:
    return [tensor(sequence, dtype=torch.float64) for sequence in sequences]


def dpo(r_w: float, r_l: float, *, grad: bool = False, **options):
    """One pair of two tokens against one, with these log-ratios and the margin ln 2.

    With `grad`, also -dL/dr_w and dL/dr_l.
    """
    chosen = steps([REF_W[0] + r_w / 4, REF_W[1] + r_w * 3 / 4])
    rejected = steps([REF_L[0] + r_l])
    for y in (*chosen, *rejected):
        y.requires_grad_()
    entropies = [steps([1.0, 2.0]), steps([0.5])]  # means 1.5 and 0.5: of both 1
    loss = oracle.dpo(chosen, rejected, steps(REF_W), steps(REF_L), margins=[LN2], ref_entropies=entropies, **options)
    if not grad:
        return loss.item()
    loss.backward()
    assert chosen[0].grad[0] == chosen[0].grad[1]  # both tokens move r_w alike
    return loss.item(), -chosen[0].grad[0].item(), rejected[0].grad[0].item()


def slope(x: float) -> float:
    """-d softplus(-x)/dx"""
    return 1 / (1 + exp(x))


# ---------------------------------------------------------------------------------------------- policy = reference
EXO = log(0.999 / 0.001) / 4
DISCO = 3 / 4 - (1 - LN2) / (4 * 0.05)  # negative: the loss wants the smaller margin
AT_REFERENCE = {  # name: (options, loss, -dL/dr_w / beta, dL/dr_l / beta), beta = 0.1
    "sigmoid": ({}, LN2, 1 / 2, 1 / 2),
    "hinge": ({}, 1, 1, 1),
    "ipo": ({}, 25, 50, 100),  # 2 * 5 / |y| / 0.1
    "exo_pair": ({"label_smoothing": 1e-3}, -LN2 - log(0.001 * 0.999) / 2, EXO, EXO),
    "nca_pair": ({}, 2 * LN2, 1 / 4, 1 / 4),
    "robust": ({"label_smoothing": 0.1}, LN2, 0.625, 0.625),
    "bco_pair": ({}, 2 * LN2, 1 / 2, 1 / 2),
    "sppo_hard": ({}, 50, 100, 100),
    "aot": ({"label_smoothing": 0.2}, LN2, 0.3, 0.3),
    "aot_unpaired": ({"label_smoothing": 0.2}, LN2, 0.3, 0.3),
    "apo_zero": ({}, 1, 1 / 4, 1 / 4),
    "apo_down": ({}, 1, 0, 1 / 4),
    "discopop": ({}, (1 + LN2) / 2, DISCO, DISCO),
    "sft": ({}, 7 / 2, 5, 0),  # 1 / (2 tokens * 0.1)
    "sigmoid_norm": ({}, LN2, 1 / 4, 1 / 2),
    "cdpo": ({"label_smoothing": 0.2}, LN2, 0.3, 0.3),
    "irpo": ({}, LN2 + 7 / 2, 1 / 2 + 5, 1 / 2),
    "dpop": ({}, LN2, 1 / 2, 1 / 2),  # the kink, where relu has slope 0
    "cal_dpo": ({}, LN2 + 25, 55, 55),  # (1/2 + 5) / 0.1: no beta in its sigmoid
    "r_dpo": ({}, log(1 + exp(-0.1)), slope(0.1), slope(0.1)),  # one token more: alpha * 1
    "chi_po": ({}, LN2, 1, 1),
    # Da = Dref = -3.5 + 5 = 1.5: 0.1 (1.5 - 0.25 * 1.5 - 0.75 * 0.1) = 0.105
    "rainbow": ({}, log(1 + exp(-0.105)), slope(0.105) / 2, slope(0.105)),
    "beta_dpo": ({}, LN2, 1 / 2, 1 / 2),
    "ipo_sum": ({}, 25, 100, 100),
    "alpha_dpo": ({}, log(1 + exp(-0.14)), slope(0.14) / 2, slope(0.14)),  # 0.1 (1.5 - 0.1), no deviation
    "dr_dpo": ({}, LN2, 1 / 2, 1 / 2),
    "odpo": ({}, LN3, 2 / 3, 2 / 3),
    "modpo": ({}, LN3, 4 / 3, 4 / 3),
    "sppo": ({}, 50 / 9, 100 / 3, 100 / 3),  # P = 2/3: targets 5/3
    "cauchy": ({}, LN2, 2 / pi, 2 / pi),
    "focal_po": ({"focal_po_gamma": 1.0}, LN2 / 2, (1 - LN2) / 4, (1 - LN2) / 4),
    "h_dpo": ({}, log(1 + exp(-0.01)), 0.95 * slope(0.01), 0.95 * slope(0.01)),  # 0.1 (2 - 0.95 * 2)
    "dpo_shift": ({}, LN2, 1 / 2, 0.475),
    "bpo": ({}, LN2, 1 / 4, 0.2375),  # the kink: half of each
    "minor_dpo": ({}, LN2, 1 / 2, 0),  # the kink, where relu has slope 0
    "c2_dpo": ({}, LN2, 1 / 2, 1 / 2),
    "sba": ({}, 1 / 2, 1 / 2, 1 / 2),
    "mallows": ({"mallows_max_entropy": exp(2), "mallows_phi": 0.3}, LN2, 0.3, 0.3),
}


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_value_and_slopes_where_the_policy_is_the_reference(name: str) -> None:
    options, value, slope_w, slope_l = AT_REFERENCE[name]
    assert dpo(0, 0, loss_type=name, grad=True, **options) == pytest.approx(
        (value, slope_w * 0.1, slope_l * 0.1), rel=1e-12, abs=1e-14
    )


# ------------------------------------------------------------- r_w = ln 3 over 2 tokens, r_l = -ln 2 over 1, beta = 1
# Delta = ln 6; sigmoid of Delta 6/7, of r_w 3/4, of r_l 1/3; D = ln 3 / 2 + ln 2 = ln(2 sqrt 3)
SPPO = (LN3 - 0.5) ** 2 + (LN2 - 0.5) ** 2
AWAY = [
    ("sigmoid", {}, log(7 / 6)),
    ("sigmoid", {"label_smoothing": 0.2}, log(7 / 6)),  # has none
    ("hinge", {}, 0),
    ("hinge", {"beta": 0.5}, 1 - LN6 / 2),
    ("ipo", {}, (LN3 / 2 + LN2 - 0.5) ** 2),
    ("exo_pair", {"label_smoothing": 0.2}, 6 / 7 * log(6 / 7 / 0.8) + 1 / 7 * log(1 / 7 / 0.2)),
    ("nca_pair", {}, log(4 / 3) + log(4) / 2 + log(3 / 2) / 2),
    ("robust", {"label_smoothing": 0.2}, (0.8 * log(7 / 6) - 0.2 * log(7)) / 0.6),
    ("bco_pair", {}, log(4 / 3) + log(3 / 2)),
    ("sppo_hard", {}, SPPO),
    ("aot", {"label_smoothing": 0.2}, 0.8 * log(7 / 6) + 0.2 * log(7)),
    ("aot_unpaired", {"label_smoothing": 0.2}, 0.8 * log(7 / 6) + 0.2 * log(7)),
    ("apo_zero", {}, 1 / 4 + 1 / 3),
    ("apo_down", {}, 3 / 4 + 1 / 7),
    ("discopop", {"discopop_tau": 1.0}, 1 / 7 * log(7 / 6) + 6 / 7 * 1 / 6),
    ("discopop", {"discopop_tau": 0.5}, 1 / 37 * log(7 / 6) + 36 / 37 * 1 / 6),
    ("sft", {}, (7 - LN3) / 2),
    ("sigmoid_norm", {}, log(1 + 1 / (2 * sqrt(3)))),
    ("cdpo", {"label_smoothing": 0.2}, 0.8 * log(7 / 6) + 0.2 * log(7)),
    ("irpo", {"irpo_alpha": 0.5}, log(7 / 6) + 0.5 * (7 - LN3) / 2),
    ("dpop", {}, log(7 / 6)),  # the chosen answer got likelier: no fine
    ("cal_dpo", {}, log(7 / 6) + SPPO / 2),
    ("cal_dpo", {"beta": 0.5, "cal_dpo_coef": 2.0}, log(7 / 6) + 2 * ((LN3 - 1) ** 2 + (LN2 - 1) ** 2)),
    ("r_dpo", {"r_dpo_alpha": LN2}, log(13 / 12)),
    ("chi_po", {}, log(1 + exp(-2.5) / 6)),  # 3 + ln 3 - (1/2 - ln 2)
    ("chi_po", {"chi_po_r_max": 1.0}, log(1 + exp(-2))),
    # Da = 1.5 + D, Dref = 1.5: 1.5 + D - 0.75 - 0.1
    ("rainbow", {"rainbow_mu": 0.5, "rainbow_gamma": 0.2}, log(1 + exp(-0.65) / (2 * sqrt(3)))),
    ("beta_dpo", {"beta_dpo_mean": LN6 + 5 / 6}, log(1 + 1 / sqrt(6))),  # beta' = 1 - 0.6 * 5/6 = 1/2
    ("beta_dpo", {"beta_dpo_mean": LN6 - 1, "beta_dpo_coef": 1.0}, log(1 + 1 / 36)),  # beta' = 2
    ("beta_dpo", {"beta_dpo_mean": 1000.0}, log(1 + 6**-0.001)),  # beta' is at least 1e-3
    ("ipo_sum", {}, (LN6 - 0.5) ** 2),
    ("alpha_dpo", {"rainbow_gamma": 0.2}, log(1 + exp(-1.3) / (2 * sqrt(3)))),
    ("dr_dpo", {"dr_dpo_beta": 0.2}, log(7 / 6)),
    ("odpo", {"odpo_alpha": 2.0}, log(5 / 3)),  # ln 6 - 2 ln 2
    ("modpo", {}, log(19 / 18)),  # 2 ln 6 - ln 2
    ("sppo", {}, (LN3 - 1 / 6) ** 2 + (LN2 - 1 / 6) ** 2),
    ("cauchy", {}, -log(0.5 + atan(LN6) / pi)),
    ("cauchy", {"beta": 1e-3}, -log(0.5 + atan(LN6 / 1000) / pi)),
    ("focal_po", {"focal_po_gamma": 1.0}, 6 / 7 * log(7 / 6)),
    ("h_dpo", {"h_dpo_alpha": 2.0}, log(1 + exp(2) / 36)),  # 2 (ln 6 - 2) + 2
    ("dpo_shift", {"rejected_weight": 0.5}, log(1 + 1 / (3 * sqrt(2)))),
    ("bpo", {"rejected_weight": 0.5}, log(1 + 1 / sqrt(2))),
    ("bpo", {"rejected_weight": 1.0, "beta": 2.0}, log(5 / 4)),
    ("minor_dpo", {}, log(4 / 3)),
    ("mallows", {"mallows_max_entropy": exp(2), "mallows_phi": 0.5}, log(7 / 6)),
    ("mallows", {"mallows_max_entropy": exp(1), "mallows_phi": 0.5}, log(1 + 1 / sqrt(6))),
    ("mallows", {"mallows_max_entropy": 0.9}, LN2),
    ("mallows", {"mallows_max_entropy": 1e7, "mallows_phi": 1 / log(1e6)}, log(7 / 6)),
    ("c2_dpo", {"c2_dpo_lambda": 2.0}, log(7 / 6) + 2 * log(1.5) ** 2),
    # R = 1/6
    ("sba", {}, 1 / sqrt(6) - 1 / 2),
    ("sba", {"sba_lambda": 0.0}, (1 / 6 - LN6) / 4),
    ("sba", {"sba_lambda": 1.0}, 1 / 288 - 5 / 4),
    ("sigmoid", {"reference_free": True}, log(1 + exp(2) / 6)),  # -7 + ln 3 + 5 + ln 2
    ("sigmoid", {"humanline_clip": (-0.5, 10.0)}, log(1 + exp(-0.5) / 3)),  # -ln 2 becomes -1/2
]


@pytest.mark.parametrize("name, options, expected", AWAY)
def test_value_away_from_the_reference(name: str, options: dict, expected: float) -> None:
    assert dpo(LN3, -LN2, **{"loss_type": name, "beta": 1.0, **options}) == pytest.approx(
        expected, rel=1e-12, abs=1e-14
    )


def test_a_pair_with_nothing_to_score_has_no_loss_and_counts() -> None:
    nothing = steps([])
    pairs = (steps(y) for y in ([-2.5, -4.0], [-5.5], REF_W, REF_L))
    chosen, rejected, ref_w, ref_l = pairs
    for name, (options, *_) in AT_REFERENCE.items():
        told = [steps([1.0, 1.0]), steps([1.0])]
        one = oracle.dpo(chosen, rejected, ref_w, ref_l, loss_type=name, margins=[0.3], ref_entropies=told, **options)
        padded = [step + nothing for step in (chosen, rejected, ref_w, ref_l)]
        factor = 1 if name == "sft" else 1 / 2  # a mean over tokens, of which there are no more
        told = [h + nothing for h in told]
        both = oracle.dpo(*padded, loss_type=name, margins=[0.3, 9.0], ref_entropies=told, **options)
        assert both.item() == pytest.approx(factor * one.item()), name
        told = [nothing, nothing]
        empty = oracle.dpo(
            nothing, nothing, nothing, nothing, loss_type=name, margins=[0.3], ref_entropies=told, **options
        )
        assert empty.item() == 0


def test_dpop_fines_a_chosen_answer_that_got_less_likely() -> None:
    # r_w = -ln 2, r_l = -ln 3: Delta - 2 ln 2 = ln(3/2) - ln 4 = ln(3/8)
    loss, slope_w, slope_l = dpo(-LN2, -LN3, loss_type="dpop", beta=1.0, dpop_lambda=2.0, grad=True)
    assert (loss, slope_w, slope_l) == pytest.approx((log(11 / 3), 3 * 8 / 11, 8 / 11))


def test_dr_dpo_and_alpha_dpo_look_at_the_whole_step() -> None:
    chosen, rejected, refs = steps([1.0], [-1.0], []), steps([-1.0], [-1.0], []), steps([-1.0], [-1.0], [])
    # Delta 2 and 0; the empty pair counts in the divisor alone
    losses = [log(1 + exp(-2)), LN2]
    soft = -0.5 * log((exp(-2 * losses[0]) + exp(-2 * losses[1])) / 2)
    got = oracle.dpo(chosen, rejected, refs, refs, loss_type="dr_dpo", beta=1.0, dr_dpo_beta=0.5)
    assert got.item() == pytest.approx(2 * soft / 3)
    # mean 1, deviation sqrt 2: scores 1 / sqrt 2 and its opposite
    got = oracle.dpo(
        chosen, rejected, refs, refs, loss_type="alpha_dpo", beta=1.0, rainbow_gamma=0.0, alpha_dpo_coef=sqrt(2)
    )
    assert got.item() == pytest.approx((log(1 + exp(-1)) + log(1 + exp(-1))) / 3)


def test_chi_po_has_no_gradient_outside_its_clip_and_survives_large_ratios() -> None:
    assert dpo(LN3, -LN2, loss_type="chi_po", beta=1.0, chi_po_r_max=1.0, grad=True)[1:] == (0, 0)
    assert dpo(900, -900, loss_type="chi_po", beta=1.0) == pytest.approx(log(1 + exp(-20)))


def test_beta_dpo_takes_the_mean_margin_of_the_step_and_no_gradient_through_it() -> None:
    ref_w, ref_l = steps([-1.0], [-1.0], []), steps([-1.0], [-1.0], [])
    chosen, rejected = (
        steps([1.0], [-1.0], []),
        steps([-1.0], [-5.0], []),
    )  # Delta 2 and 4: mean 3, the empty pair apart
    for y in chosen:
        y.requires_grad_()
    options = dict(
        loss_type="beta_dpo", beta=0.5, beta_dpo_coef=0.5, beta_dpo_mean=1.0
    )  # beta' = 0.5 (1 + 0.5 * 2) = 1
    loss = oracle.dpo(chosen, rejected, ref_w, ref_l, **options)
    assert loss.item() == pytest.approx((log(1 + exp(-2)) + log(1 + exp(-4))) / 3)
    loss.backward()
    assert [y.grad.item() for y in chosen[:2]] == pytest.approx([-slope(2) / 3, -slope(4) / 3])
    mean = oracle.beta_dpo_next_mean(chosen, rejected, ref_w, ref_l, beta_dpo_mean=1.0, beta_dpo_momentum=0.75)
    assert mean == pytest.approx(0.75 * 1 + 0.25 * 3)


# ---------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    "divergence, alpha, f_w, f_l",
    [
        ("reverse_kl", 0.5, LN3, -LN2),
        ("forward_kl", 0.5, 2 / 3, -1),
        ("js_divergence", 0.5, log(3 / 2), log(2 / 3)),
        ("alpha_divergence", 0.5, 2 - 2 / sqrt(3), 2 - 2 * sqrt(2)),
        ("alpha_divergence", 2.0, 2, -1 / 2),
        ("alpha_divergence", 1.0, LN3, -LN2),
        ("alpha_divergence", 0.0, 2 / 3, -1),
    ],
)
def test_f_divergences(divergence: str, alpha: float, f_w: float, f_l: float) -> None:
    common = dict(beta=1.0, f_divergence_type=divergence, f_alpha_divergence_coef=alpha, label_smoothing=0.2)
    x, m = f_w - f_l, 1 / (1 + exp(f_l - f_w))
    expected = {
        "sigmoid": log(1 + exp(-x)),
        "hinge": max(0, 1 - x),
        "ipo": (f_w / 2 - f_l - 0.5) ** 2,
        "ipo_sum": (f_w - f_l - 0.5) ** 2,
        "sigmoid_norm": log(1 + exp(f_l - f_w / 2)),
        "exo_pair": m * log(m / 0.8) + (1 - m) * log((1 - m) / 0.2),
        "robust": (0.8 * log(1 + exp(-x)) - 0.2 * log(1 + exp(x))) / 0.6,
        "discopop": (1 - m) * log(1 + exp(-x)) + m * exp(-x),
        "sba": exp(-x / 2) - 1 / 2,
        "sft": (7 - LN3) / 2,
    }
    for name, value in expected.items():
        got = dpo(LN3, -LN2, loss_type=name, discopop_tau=1.0, **common)
        assert got == pytest.approx(value, rel=1e-12, abs=1e-14), name
    for name in AT_REFERENCE.keys() - expected.keys():
        if divergence != "reverse_kl":
            with pytest.raises(ValueError, match="has no form"):
                dpo(LN3, -LN2, loss_type=name, **common)


def test_ld_alpha_discounts_what_is_past_the_shorter_completion_in_both_models() -> None:
    ref_w, ref_l = steps([-1.0, -2.0, -3.0]), steps([-2.0])
    chosen, rejected = steps([0.0, 0.0, 1.0]), steps([-1.0])  # r_w = 1 + 6 a, r_l = 1
    for a in (0.0, 0.5, 1.0):
        for sides, x in [((chosen, rejected, ref_w, ref_l), 6 * a), ((rejected, chosen, ref_l, ref_w), -6 * a)]:
            loss = oracle.dpo(*sides, beta=0.5, ld_alpha=a)
            assert loss.item() == pytest.approx(log(1 + exp(-0.5 * x)))
    # sigmoid_norm still divides by the whole length
    loss = oracle.dpo(chosen, rejected, ref_w, ref_l, beta=1.0, ld_alpha=0.5, loss_type="sigmoid_norm")
    assert loss.item() == pytest.approx(log(1 + exp(1 - 4 / 3)))


def test_down_sampling_takes_as_many_tokens_of_both_models() -> None:
    ref_w, ref_l = steps([-1.0, -2.0, -3.0]), steps([-2.0, -1.0])
    chosen, rejected = steps([0.0, 0.5, 1.0]), steps([-1.0, -1.0])  # r 1, 2.5, 4: the last two; and 1, 0
    for sides, x in [((chosen, rejected, ref_w, ref_l), 5.5), ((rejected, chosen, ref_l, ref_w), -5.5)]:
        loss = oracle.dpo(*sides, beta=0.5, down_sample=True)
        assert loss.item() == pytest.approx(log(1 + exp(-0.5 * x)))
    four, none = steps([-1.0, -2.0, -4.0, -8.0]), steps([])
    for other, taken in ((steps([-1.0]), -8 + 1), (none, 0)):  # of four the last; none
        loss = oracle.dpo(four, other, four, other, beta=1.0, down_sample=True, reference_free=True)
        assert loss.item() == pytest.approx(log(1 + exp(-taken)))


def test_mallows_takes_the_mean_of_the_sides_that_have_tokens() -> None:
    chosen, rejected, ref = steps([-1.0, -1.0]), steps([]), steps([-2.0, -1.5])  # r_w = 1.5
    told = [steps([1.0, 3.0]), steps([])]  # mean 2
    options = dict(loss_type="mallows", beta=1.0, mallows_phi=1.0, mallows_max_entropy=2 * exp(1))
    loss = oracle.dpo(chosen, rejected, ref, steps([]), ref_entropies=told, **options)
    assert loss.item() == pytest.approx(log(1 + exp(-1.5)))
    with pytest.raises(ValueError, match="^loss_type='mallows' needs ref_entropies$"):
        oracle.dpo(chosen, rejected, ref, steps([]), **options)


def test_use_weighting_multiplies_each_pair_without_a_gradient_of_its_own() -> None:
    chosen, rejected = steps([-LN2, -2 * LN2], [-1.0]), steps([-LN2], [])
    p2 = dict(chosen_log_sum_p2=steps([-2 * LN2] * 2, [-1 - LN3]), rejected_log_sum_p2=steps([-2 * LN2], []))
    # w = exp of means: 2^(1/2) and 2; 3 and, of nothing, 1
    for y in chosen:
        y.requires_grad_()
    refs = [[y.detach() for y in step] for step in (chosen, rejected)]
    loss = oracle.dpo(chosen, rejected, *refs, use_weighting=True, beta=1.0, **p2)
    assert loss.item() == pytest.approx((2 * sqrt(2) + 3) * LN2 / 2)
    loss.backward()
    assert chosen[0].grad.tolist() == pytest.approx([-sqrt(2) / 2] * 2) and chosen[1].grad.item() == pytest.approx(
        -3 / 4
    )
    sft = oracle.dpo(chosen, rejected, *refs, use_weighting=True, loss_type="sft", **p2)
    assert sft.item() == pytest.approx((2 * sqrt(2) * 3 * LN2 + 3 * 1) / 3)  # over three chosen tokens
    with pytest.raises(ValueError, match="needs chosen_log_sum_p2"):
        oracle.dpo(chosen, rejected, *refs, use_weighting=True)
    with pytest.raises(ValueError, match="aot"):
        oracle.dpo(chosen, rejected, *refs, use_weighting=True, loss_type="aot", **p2)


def test_a_list_of_losses_is_their_weighted_sum() -> None:
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    parts = [log(7 / 6), LN2, (7 - LN3) / 2]
    assert dpo(LN3, -LN2, beta=1.0, loss_type=names) == pytest.approx(sum(parts))
    mixed = dpo(LN3, -LN2, beta=1.0, loss_type=names, loss_weights=weights)
    assert mixed == pytest.approx(sum(c * part for c, part in zip(weights, parts, strict=True)))


def test_aot_sorts_the_whole_step() -> None:
    chosen, rejected = steps([3.0], [], [1.0]), steps([0.0], [], [0.0])
    ref_w, ref_l = steps([-1.0], [], [2.0]), steps([0.0], [], [0.0])
    # margins 3, 1 against -1, 2: sorted 1 + 1 and 3 - 2. Ratios of the chosen 4, -1, of the rejected 0, 0
    loss = oracle.dpo(chosen, rejected, ref_w, ref_l, beta=1.0, loss_type="aot")
    assert loss.item() == pytest.approx((log(1 + exp(-2)) + log(1 + exp(-1))) / 3)
    ref_l = steps([4.0], [], [-3.0])  # ratios of the rejected -4, 3: sorted -1 + 4 and 4 - 3
    loss = oracle.dpo(chosen, rejected, ref_w, ref_l, beta=1.0, loss_type="aot_unpaired")
    assert loss.item() == pytest.approx((log(1 + exp(-3)) + log(1 + exp(-1))) / 3)


def test_refusals() -> None:
    for options in [{"loss_type": "dpo"}, {"f_divergence_type": "hellinger"}, {"loss_type": "exo_pair"}]:
        with pytest.raises(ValueError, match="no formula|needs label_smoothing"):
            dpo(0, 0, **options)
    with pytest.raises(ValueError):
        dpo(0, 0, loss_type=["sigmoid", "sft"], loss_weights=[1.0])
