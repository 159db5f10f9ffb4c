"""Which registered loss keeps which law of its family, with its constants, and which must break it: laws 1 to 8.

Values and slopes at the reference, flipped labels, shifts, monotonicity, bounds.
"""

import math
from dataclasses import replace

import torch

from logratio.losses import CPOLoss, ORPOLoss, TPOLoss
from logratio.reference import family_laws as laws
from logratio.reference.family_laws import equal_lengths, swapped
from logratio.reference.strategies import Batch

from ._families import DIVERGENCES, LN2, PLAIN, E, breaks, cpo, dpo, each, keeps, kto


@each(
    *((dpo(name), LN2) for name in "sigmoid robust aot aot_unpaired sigmoid_norm cdpo dpop chi_po beta_dpo".split()),
    *((dpo(name), LN2) for name in "dr_dpo cauchy dpo_shift bpo minor_dpo c2_dpo mallows".split()),
    (dpo("sba"), 0.5),
    (dpo("sba", sba_lambda=1.0), 0.125),
    (dpo("focal_po", focal_po_gamma=0.5), LN2 / 2**0.5),
    (dpo("ipo_sum", beta=0.1), 25.0),
    (dpo("odpo", odpo_alpha=0.0), LN2),
    *((dpo("sigmoid", f_divergence_type=name), LN2) for name in DIVERGENCES),
    (dpo("hinge"), 1.0),
    (dpo("ipo", beta=0.1), 25.0),
    (dpo("exo_pair", label_smoothing=1e-3), -LN2 - math.log(1e-3 * (1 - 1e-3)) / 2),
    *((dpo(name), 2 * LN2) for name in ("nca_pair", "bco_pair")),
    (dpo("sppo_hard", beta=0.1), 50.0),
    *((dpo(name), 1.0) for name in ("apo_zero", "apo_down")),
    (dpo("discopop"), (1 + LN2) / 2),
    (dpo("cal_dpo", beta=0.1), LN2 + 25.0),
)
def test_law_1_constant_at_the_reference(given):
    loss, constant = given
    keeps(lambda batch: laws.constant_at_reference(loss, batch, constant))


@each(*map(dpo, "sft irpo rainbow r_dpo alpha_dpo h_dpo odpo".split()), cpo("sigmoid"))
def test_law_1_is_broken_by_what_looks_at_more_than_the_ratios(given):
    breaks(lambda batch: laws.constant_at_reference(given, batch, LN2), "constant_at_reference")


@each((kto("kto"), 0.5), (kto("apo_zero_unpaired"), 0.5), (kto("bco"), LN2))
def test_law_1_of_labelled_examples(given):
    loss, constant = given
    keeps(lambda batch: laws.constant_at_reference(loss, batch, constant), "labeled")
    heavy = replace(loss, desirable_weight=3.0, undesirable_weight=0.5)

    def law(batch: Batch) -> None:
        laws.constant_at_reference(heavy, batch, torch.where(batch.rows["label"], 3.0, 0.5).double() * constant)

    keeps(law, "labeled")


@each(
    *((dpo(name), 0.5, 0.5) for name in ("sigmoid", "bco_pair", "aot", "aot_unpaired", "dpop", "beta_dpo")),
    (dpo("hinge"), 1.0, 1.0),
    (dpo("dr_dpo"), 0.5, 0.5),
    (dpo("cauchy"), 2 / math.pi, 2 / math.pi),
    (dpo("c2_dpo", c2_dpo_lambda=0.3), 0.5, 0.5),
    *((dpo("sba", sba_lambda=power), 0.5, 0.5) for power in (-0.5, 0.0, 2.0)),
    (dpo("dpo_shift", rejected_weight=0.6), 0.5, 0.3),
    (dpo("bpo", rejected_weight=0.6), 0.25, 0.15),  # torch's halves at the kink
    (dpo("minor_dpo"), 0.5, 0.0),
    (dpo("focal_po", focal_po_gamma=1.0), (1 - LN2) / 4, (1 - LN2) / 4),
    (dpo("exo_pair"), math.log((1 - E) / E) / 4, math.log((1 - E) / E) / 4),
    (dpo("nca_pair"), 0.25, 0.25),
    (dpo("robust"), 1 / (2 * (1 - 2 * E)), 1 / (2 * (1 - 2 * E))),
    (dpo("cdpo"), (1 - 2 * E) / 2, (1 - 2 * E) / 2),
    (dpo("apo_zero"), 0.25, 0.25),
    (dpo("apo_down"), 0.0, 0.25),
    (dpo("chi_po"), 1.0, 1.0),
    (dpo("discopop"), 0.75 - (1 - LN2) / 0.2, 0.75 - (1 - LN2) / 0.2),
    *((dpo("sigmoid", f_divergence_type=name), s / 2, s / 2) for name, s in zip(DIVERGENCES, (1, 0.5, 1), strict=True)),
)
def test_law_1_slopes_at_the_reference(given):
    loss, chosen, rejected = given
    keeps(lambda batch: laws.slopes_at_reference(loss, batch, chosen * loss.beta, rejected * loss.beta))


@each(
    (dpo("sigmoid"), 0.5),
    (dpo("bco_pair"), 0.5),
    (dpo("aot"), 0.5),
    (dpo("aot_unpaired"), 0.5),
    (dpo("cdpo"), 0.5 * (1 - 2 * E)),
    (dpo("robust"), 0.5 / (1 - 2 * E)),
    (dpo("sppo_hard"), 2 / 0.5),
    (dpo("ipo"), 2 / 0.5, {"averages": True}),
    (dpo("ipo_sum"), 2 / 0.5),
    (dpo("sigmoid_norm"), 0.5, {"averages": True}),
    (dpo("sigmoid", reference_free=True), 0.5, {"reference": False}),
    (cpo("sigmoid", label_smoothing=E), 0.5 * (1 - 2 * E), {"reference": False}),
    (cpo("ipo"), 2 / 0.5, {"reference": False, "averages": True}),
    (cpo("simpo", simpo_gamma=0.0), 0.5, {"reference": False, "averages": True}),
)
def test_law_2_a_flipped_label_changes_the_loss_by_the_margin(given):
    loss, factor, *of = given
    keeps(lambda batch: laws.label_flip(loss, batch, factor, **(of or [{}])[0]))


@each(dpo("hinge"), dpo("nca_pair"), dpo("apo_zero"), dpo("chi_po"), dpo("r_dpo"), dpo("sft"), cpo("simper"))
def test_law_2_is_broken_by_losses_that_bend(given):
    breaks(lambda batch: laws.label_flip(given, batch, given.beta), "label_flip")


def test_law_3_smoothed_labels():
    """cdpo = sp(-x) + e x, robust = sp(-x) - e x / (1 - 2e), and robust is unbiased; x = sp(x) - sp(-x)."""
    sigmoid, cdpo, robust = dpo("sigmoid"), dpo("cdpo"), dpo("robust")
    keeps(lambda batch: laws.combination(cdpo, batch, (1 - E, sigmoid), (E, sigmoid, swapped)))
    shares = (1 - E) / (1 - 2 * E), -E / (1 - 2 * E)
    keeps(lambda batch: laws.combination(robust, batch, (shares[0], sigmoid), (shares[1], sigmoid, swapped)))
    keeps(lambda batch: laws.combination(sigmoid, batch, (1 - E, robust), (E, robust, swapped)))


@each(
    (lambda beta: dpo("sigmoid", beta=beta), {}),
    (lambda beta: dpo("sigmoid_norm", beta=beta), {"averages": True}),
    (lambda beta: cpo("sigmoid", beta=beta), {"reference": False}),
)
def test_law_4_limits_in_beta(given):
    make, of = given
    keeps(lambda batch: laws.limits_in_beta(make, batch, **of))


@each(*(dpo(name) for name in PLAIN if name not in ("aot",)))
def test_law_5_a_constant_of_each_completion_cancels_with_the_reference(given):
    keeps(lambda batch: laws.reference_shift(given, batch, -0.3))


@each(*(kto(name) for name in ("kto", "apo_zero_unpaired", "bco")))
def test_law_5_of_labelled_examples(given):
    keeps(lambda batch: laws.reference_shift(given, batch, -0.3), "labeled")


@each(dpo("aot"), dpo("sft"), dpo("irpo"), dpo("rainbow"), dpo("sigmoid", use_weighting=True), cpo("sigmoid"))
def test_law_5_is_broken_by_what_sees_the_policy_alone(given):
    breaks(lambda batch: laws.reference_shift(given, batch, -0.3), "reference_shift")


MARGIN_ONLY = "sigmoid hinge exo_pair robust discopop cdpo aot aot_unpaired r_dpo beta_dpo".split()
MARGIN_ONLY += "ipo_sum dr_dpo odpo modpo cauchy focal_po sba mallows".split()


@each(*map(dpo, MARGIN_ONLY), cpo("sigmoid"), cpo("hinge"))
def test_law_6_only_the_margin_matters(given):
    keeps(lambda batch: laws.common_shift(given, batch, -0.7))


@each(dpo("ipo"), dpo("sigmoid_norm"), cpo("ipo"), cpo("simpo"))
def test_law_6_of_averages_at_equal_lengths(given):
    keeps(lambda batch: laws.common_shift(given, equal_lengths(batch), -0.7))
    breaks(lambda batch: laws.common_shift(given, batch, -0.7), "common_shift")


@each(
    *map(dpo, "nca_pair bco_pair sppo_hard apo_zero apo_down chi_po cal_dpo dpop sft irpo c2_dpo".split()),
    cpo("simper"),
)
def test_law_6_is_broken_by_what_sees_each_ratio(given):
    breaks(lambda batch: laws.common_shift(given, batch, -0.7), "common_shift")


MONOTONE = (
    "sigmoid hinge robust bco_pair apo_zero dpop chi_po aot aot_unpaired sigmoid_norm r_dpo rainbow irpo sft beta_dpo "
    "sba mallows"
)


@each(
    *map(dpo, MONOTONE.split()),
    *(dpo("sigmoid", f_divergence_type=name) for name in DIVERGENCES),
    *map(cpo, ("sigmoid", "hinge", "simpo", "alphapo", "simper")),
    *(CPOLoss(loss_type=name) for name in ("sigmoid", "hinge", "simpo")),
    *(TPOLoss(loss_type=name) for name in ("sigmoid", "hinge", "tpo-l")),
    ORPOLoss(),
)
def test_law_7_monotone(given):
    keeps(lambda batch: laws.monotone(given, batch))


@each(*map(kto, ("kto", "apo_zero_unpaired", "bco")))
def test_law_7_of_labelled_examples(given):
    keeps(lambda batch: laws.monotone(given, batch), "labeled")


@each(
    *map(dpo, ("nca_pair", "ipo", "sppo_hard", "cal_dpo", "apo_down")),
    *(dpo(name, beta=5.0) for name in ("exo_pair", "cdpo")),
    dpo("c2_dpo", c2_dpo_lambda=0.3),
    dpo("discopop", discopop_tau=0.05),
    cpo("ipo"),
)
def test_law_7_is_broken_by_losses_with_a_finite_optimum(given):
    breaks(lambda batch: laws.monotone(given, batch), "monotone", max_examples=60)


@each(
    *(
        (dpo(name), 0.5)
        for name in ("sigmoid", "hinge", "bco_pair", "nca_pair", "cdpo", "aot", "aot_unpaired", "r_dpo")
    ),
    (dpo("robust"), 0.5 * (1 - E) / (1 - 2 * E)),
    *((dpo(name), 0.5 / 4) for name in ("apo_zero", "apo_down")),
    (cpo("sigmoid"), 0.5),
)
def test_law_8_bounded_slopes(given):
    loss, bound = given
    keeps(lambda batch: laws.bounded_slope(loss, batch, bound))


def test_law_8_of_labelled_examples():
    for name, bound in (("kto", 0.5 * 3 / 4), ("apo_zero_unpaired", 0.5 * 3 / 4), ("bco", 0.5 * 3)):
        loss = kto(name, desirable_weight=3.0)
        keeps(lambda batch, loss=loss, bound=bound: laws.bounded_slope(loss, batch, bound), "labeled")


@each(
    *map(dpo, ("ipo", "sppo_hard", "cal_dpo", "chi_po", "dpop", "sba")), dpo("sigmoid", f_divergence_type="forward_kl")
)
def test_law_8_is_broken_by_losses_that_are_not_bounded(given):
    breaks(lambda batch: laws.bounded_slope(given, batch, given.beta), "bounded_slope", max_examples=60)
