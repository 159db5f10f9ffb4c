"""Losses that are made of others, or are others where an option is neutral: laws 9 to 17 and 25."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from logratio.losses import CPOLoss, DPOLoss, Loss, ORPOLoss, SFTLoss, TPOLoss
from logratio.reference import family_laws as laws
from logratio.reference._law_runs import run, totals_of
from logratio.reference.family_laws import equal_lengths, moved, put, put_role, scored, swapped, unpaired
from logratio.reference.strategies import Batch, take

from ._families import DIVERGENCES, LN2, E, H, breaks, cpo, dpo, each, keeps, kto


def twice_chosen(batch: Batch) -> Batch:
    return put(batch, rejected="chosen")


def test_law_9_losses_made_of_others():
    """nca = bco_pair / 2 + (sp(-b r_w) + sp(b r_w)) / 2: the latter is bco_pair of the chosen with itself."""
    nca, bco, sppo = dpo("nca_pair"), dpo("bco_pair"), dpo("sppo_hard")
    keeps(lambda batch: laws.combination(nca, scored(batch), (0.5, bco), (0.5, bco, twice_chosen)))
    cal = dpo("cal_dpo", cal_dpo_coef=0.3)
    keeps(lambda batch: laws.combination(cal, batch, (1, dpo("sigmoid", beta=1.0)), (0.3, sppo)))
    mix = DPOLoss(loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0), beta=0.5)
    keeps(lambda batch: laws.combination(mix, batch, (0.8, dpo("sigmoid")), (0.2, bco), (1, dpo("sft"))))
    irpo = dpo("irpo", irpo_alpha=0.3)
    keeps(lambda batch: laws.combination(irpo, equal_lengths(batch), (1, dpo("sigmoid")), (0.3, dpo("sft"))))


def without_reference(batch: Batch) -> Batch:
    none = {part: torch.zeros_like(x) for part, x in batch.tokens["policy"].items()}
    return replace(batch, tokens=batch.tokens | {"ref": none})


@each(("sigmoid", "sigmoid"), ("hinge", "hinge"), ("ipo", "ipo"))
def test_cpo_is_dpo_with_a_uniform_reference_and_tpo_with_gold_as_chosen(given):
    name, _ = given
    keeps(lambda batch: laws.combination(cpo(name), batch, (1, dpo(name), without_reference)))
    tpo, same = TPOLoss(loss_type=name, beta=0.5, tpo_alpha=0.3), CPOLoss(loss_type=name, beta=0.5, cpo_alpha=0.3)
    keeps(lambda batch: laws.combination(tpo, put(batch, gold="chosen"), (1, same)))


def test_law_10_a_pair_is_two_labelled_examples():
    zero, apo = kto("apo_zero_unpaired"), dpo("apo_zero")
    keeps(lambda batch: laws.combination(apo, scored(batch), (2, zero, unpaired)))
    bco, pair = kto("bco"), dpo("bco_pair")

    def law(batch: Batch) -> None:
        examples = unpaired(scored(batch))
        totals = totals_of(bco, examples)
        opposite = {"reward_sum": -0.5 * totals.collected.sum().item(), "num_examples": 1.0}  # brings delta to 0
        got = run(bco, examples, replace(totals, state=opposite)).loss.item()
        laws.close(2 * got, laws.value(pair, scored(batch)))

    keeps(law)


@each(kto("kto", desirable_weight=2.0, undesirable_weight=2.0), kto("apo_zero_unpaired"))
def test_law_10_both_labels_sum_to_the_weight(given):
    keeps(lambda batch: laws.complementary_labels(given, batch, given.desirable_weight), "labeled")


def test_law_10_z_is_never_negative():
    negative = lambda batch: replace(batch, collected=-batch.collected.abs())  # noqa: E731
    zero = kto("apo_zero_unpaired")
    keeps(lambda batch: laws.neutral_option(kto("kto"), zero, negative(batch)), "labeled")


def test_law_10_at_z_the_weight_is_halved():
    """KTO's value function is centred at z, the mean of the mismatched log-ratios where it is positive."""
    half = kto("kto", desirable_weight=3.0, undesirable_weight=3.0)

    def law(batch: Batch) -> None:
        batch = scored(batch)
        z = batch.collected.mean().clamp(min=0).expand(len(batch))
        there = moved(put_role(batch, policy="ref"), {"completion": z}, ["policy"])
        laws.close(laws.value(half, there), 1.5)

    keeps(law, "labeled")


def test_law_11_optimal_transport():
    for name, options in (("aot", {}), ("aot", {"label_smoothing": E})):
        aot, pairing = dpo(name, **options), dpo("cdpo", **({"label_smoothing": 0.0} | options))
        for order in ([1, 2, 0], [2, 1, 0], [0, 1, 2]):

            def law(batch: Batch, aot: Loss = aot, pairing: Loss = pairing, order: Any = order) -> None:
                laws.best_pairing(aot, pairing, batch, order)

            keeps(law, min_rows=3, max_rows=3)
    unpaired_aot = dpo("aot_unpaired")
    keeps(lambda batch: laws.independent_order(unpaired_aot, batch, [1, 2, 0]), min_rows=3, max_rows=3)
    keeps(lambda batch: laws.at_least(dpo("sigmoid"), unpaired_aot, batch))
    keeps(lambda batch: laws.neutral_option(unpaired_aot, dpo("sigmoid"), scored(take(batch, [0]))))
    for name in ("aot", "sigmoid"):
        loss = dpo(name)
        breaks(
            lambda batch, loss=loss: laws.independent_order(loss, batch, [1, 2, 0]),
            "independent_order",
            min_rows=3,
            max_rows=3,
        )


@each(*map(dpo, ("sigmoid", "ipo", "nca_pair", "aot", "chi_po")))
def test_law_12_ld_alpha(given):
    one, none = replace(given, ld_alpha=1.0), replace(given, ld_alpha=0.0)
    keeps(lambda batch: laws.neutral_option(one, given, batch))
    keeps(lambda batch: laws.neutral_option(none, given, equal_lengths(batch)))
    keeps(lambda batch: laws.affine_rewards(lambda a: replace(given, ld_alpha=a), batch, 0.3))
    breaks(lambda batch: laws.neutral_option(none, given, batch), "neutral_option")


@each(*map(dpo, ("sigmoid", "nca_pair", "aot", "r_dpo")))
def test_law_12_down_sampling(given):
    """Nothing changes at equal lengths."""
    fewer = replace(given, down_sample=True)
    keeps(lambda batch: laws.neutral_option(fewer, given, equal_lengths(batch)))
    breaks(lambda batch: laws.neutral_option(fewer, given, batch), "neutral_option")


@each(
    (dpo("exo_pair"), math.log((1 - E) / E) / 0.5, 0.0, 0.0),
    (dpo("cdpo"), math.log((1 - E) / E) / 0.5, 0.0, H),
    (dpo("ipo"), 1.0, 0.0, 0.0, True),
    (dpo("sppo_hard"), 1.0, -1.0, 0.0),
)
def test_law_13_minima(given):
    loss, *there = given
    keeps(lambda batch: laws.least_at(loss, batch, *there))


def test_law_14_f_divergences():
    """f(r) <= r, and js: f(r) <= r/2, seen where rejected is at the reference and f = 0 there.

    At 0.5, alpha lies between forward (0) and reverse (1).
    """
    plain = dpo("sigmoid")
    forward, js, alpha = (replace(plain, f_divergence_type=name) for name in DIVERGENCES)

    def rejected_at_reference(batch: Batch) -> Batch:
        policy = batch.tokens["policy"] | {"rejected": batch.tokens["ref"]["rejected"]}
        return replace(batch, tokens=batch.tokens | {"policy": policy})

    for bent, bound in ((forward, plain), (alpha, plain), (js, dpo("sigmoid", beta=0.25)), (forward, alpha)):

        def law(batch: Batch, bent: Loss = bent, bound: Loss = bound) -> None:
            laws.at_least(bent, bound, rejected_at_reference(batch))

        keeps(law)
    keeps(lambda batch: laws.neutral_option(replace(alpha, f_alpha_divergence_coef=1.0), plain, batch))
    keeps(lambda batch: laws.neutral_option(replace(alpha, f_alpha_divergence_coef=0.0), forward, batch))
    nearly = replace(alpha, f_alpha_divergence_coef=1 + 1e-9)
    keeps(lambda batch: laws.limit(nearly, plain, batch), max_size=1.0)


def test_law_15_simpo_and_alphapo():
    def simpo_is_cpo(batch: Batch) -> None:
        batch = equal_lengths(batch)
        length = batch.masks["chosen"].shape[1]
        laws.neutral_option(cpo("simpo", simpo_gamma=0.0), cpo("sigmoid", beta=0.5 / length), batch)

    keeps(simpo_is_cpo)
    for name in ("simpo", "sigmoid", "ipo", "hinge"):
        plain = cpo(name)
        keeps(lambda batch, plain=plain: laws.limit(replace(plain, alpha=1e-9), plain, batch))
    keeps(lambda batch: laws.neutral_option(cpo("alphapo", alpha=0.25), cpo("simpo", alpha=0.25), batch))

    def slope_is_a_power(batch: Batch) -> None:
        batch = scored(batch)
        chosen, _ = laws.ratios(batch, reference=False)
        plain, bent = (laws.slopes(cpo("hinge", beta=1e-6, alpha=alpha), batch)["chosen"] for alpha in (0.0, 0.25))
        torch.testing.assert_close(bent, plain * torch.exp(-0.25 * chosen), rtol=1e-9, atol=0)

    keeps(slope_is_a_power, max_size=1.0)


def test_law_16_odds():
    keeps(lambda batch: laws.odds_ratio(ORPOLoss(beta=0.7), batch, 0.7))

    def at_equal_averages(batch: Batch) -> None:
        batch = put(scored(batch), rejected="chosen", prompt="chosen")
        nll = laws.value(CPOLoss(loss_type="simper", cpo_alpha=1.0), batch)  # whose pair term is 0 here
        laws.close(laws.value(ORPOLoss(beta=0.7), batch), nll + 0.7 * LN2)

    keeps(at_equal_averages)


@each(
    (dpo("cdpo", label_smoothing=0.0), dpo("sigmoid")),
    (dpo("robust", label_smoothing=0.0), dpo("sigmoid")),
    (dpo("dpop", dpop_lambda=0.0), dpo("sigmoid")),
    (dpo("r_dpo", r_dpo_alpha=0.0), dpo("sigmoid")),
    (dpo("beta_dpo", beta_dpo_coef=0.0), dpo("sigmoid")),
    (dpo("rainbow", rainbow_mu=1.0), dpo("sigmoid_norm")),
    (dpo("rainbow", rainbow_mu=0.0, rainbow_gamma=0.3), cpo("simpo", simpo_gamma=0.15)),
    (dpo("cal_dpo", cal_dpo_coef=0.0), dpo("sigmoid", beta=1.0)),
    (dpo("irpo", irpo_alpha=0.0), dpo("sigmoid")),
    (dpo("c2_dpo", c2_dpo_lambda=0.0), dpo("sigmoid")),
    (dpo("odpo", odpo_alpha=0.0), dpo("sigmoid")),
    (dpo("modpo", modpo_weight=1.0), dpo("sigmoid")),
    (dpo("h_dpo", h_dpo_alpha=1.0), dpo("sigmoid")),
    (dpo("dpo_shift", rejected_weight=1.0), dpo("sigmoid")),
    (dpo("focal_po", focal_po_gamma=0.0), dpo("sigmoid")),
    (dpo("alpha_dpo", alpha_dpo_coef=0.0, rainbow_gamma=0.3), cpo("simpo", simpo_gamma=0.15)),
    (dpo("sigmoid", humanline_clip=(-1e5, 1e5)), dpo("sigmoid")),
    (dpo("sigmoid", reference_free=True), cpo("sigmoid")),
    (dpo("ipo", reference_free=True), cpo("ipo")),
    (dpo("sigmoid_norm", reference_free=True), cpo("simpo", simpo_gamma=0.0)),
    (dpo("hinge", f_divergence_type="reverse_kl"), dpo("hinge")),
    (CPOLoss(label_smoothing=0.0, alpha=0.0), CPOLoss()),
    (CPOLoss(loss_type="alphapo"), cpo("simpo", beta=0.1)),
    (TPOLoss(loss_type="tpo-l", beta=0.5, tpo_alpha=0.0), cpo("simpo")),
)
def test_law_17_neutral_options(given):
    loss, plain = given
    keeps(lambda batch: laws.neutral_option(loss, plain, batch))


def test_mallows_is_dpo_with_a_beta_of_the_pairs_dispersion():
    """At one entropy everywhere beta becomes beta phi log(max_entropy / H)."""

    def even(batch: Batch) -> Batch:
        told = {part: torch.full_like(x, 2.0) for part, x in batch.tokens["entropy"].items()}
        return replace(batch, tokens=batch.tokens | {"entropy": told})

    loss = dpo("mallows", mallows_phi=0.4, mallows_max_entropy=2 * math.exp(3))
    keeps(lambda batch: laws.neutral_option(loss, dpo("sigmoid", beta=0.5 * 0.4 * 3), even(batch)))
    breaks(lambda batch: laws.neutral_option(loss, dpo("sigmoid", beta=0.5 * 0.4 * 3), batch), "neutral_option")


def test_law_17_options_that_are_neutral_on_some_batches():
    def raised(batch: Batch) -> Batch:
        """r_w > 0"""
        lower = batch.tokens["ref"]["chosen"].minimum(batch.tokens["policy"]["chosen"]) - 0.01
        ref = batch.tokens["ref"] | {"chosen": lower}
        return replace(batch, tokens=batch.tokens | {"ref": ref})

    keeps(lambda batch: laws.neutral_option(dpo("dpop"), dpo("sigmoid"), raised(batch)))
    breaks(lambda batch: laws.neutral_option(dpo("dpop"), dpo("sigmoid"), batch), "neutral_option")
    keeps(lambda batch: laws.neutral_option(dpo("r_dpo"), dpo("sigmoid"), equal_lengths(batch)))
    keeps(lambda batch: laws.neutral_option(dpo("minor_dpo"), dpo("sigmoid"), swapped(raised(swapped(scored(batch))))))
    keeps(lambda batch: laws.neutral_option(dpo("dr_dpo"), dpo("sigmoid"), take(batch, [0])))
    keeps(lambda batch: laws.limit(dpo("dr_dpo", dr_dpo_beta=1e7), dpo("sigmoid"), batch))
    keeps(lambda batch: laws.at_least(dpo("sigmoid"), dpo("dr_dpo"), batch))  # a soft minimum is below the mean
    keeps(lambda batch: laws.limit(dpo("sba", sba_lambda=1e-9), dpo("sba", sba_lambda=0.0), batch), max_size=1.0)
    sure = lambda batch: replace(batch, rows={"margin": 0 * batch.rows["margin"] + 50.0})  # noqa: E731
    keeps(lambda batch: laws.neutral_option(dpo("sppo"), dpo("sppo_hard"), sure(batch)))

    def longer(batch: Batch) -> Batch:
        """r_w and r_l grow by r_dpo's price of a token, over beta, for each of their tokens: that is what it adds."""
        price = 0.1 / 0.5
        by = {part: price * batch.masks[part].sum(-1).double() for part in ("chosen", "rejected")}
        return moved(batch, by, ["policy"])

    keeps(lambda batch: laws.combination(dpo("r_dpo"), scored(batch), (1, dpo("sigmoid"), longer)))
    # WPO's weight is 1 where p = sum of p^2, and with it out of the way the loss is plain
    weighted = dpo("sigmoid", use_weighting=True)
    keeps(lambda batch: laws.neutral_option(weighted, dpo("sigmoid"), put_role(batch, log_sum_p2="policy")))


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_law_25_weights_have_no_scale(loss_type):
    loss = SFTLoss(loss_type=loss_type)
    keeps(lambda batch: laws.weight_scale(loss, batch, 7.0), "sequence")

    def weights_of_one_and_zero_are_a_mask(batch: Batch) -> None:
        on = batch.tokens["policy"]["completion"] < -0.5
        one = replace(batch, tokens=batch.tokens | {"weights": {"completion": on.double()}})
        masked = replace(batch, masks={"completion": batch.masks["completion"] & on}, tokens={**batch.tokens})
        masked.tokens.pop("weights", None)
        laws.close(laws.value(loss, one), laws.value(loss, masked))

    keeps(weights_of_one_and_zero_are_a_mask, "sequence")


def test_law_25_dft_and_the_z_loss():
    def gradient_of_minus_p(batch: Batch) -> None:
        batch.tokens.pop("weights", None)
        mask, logps = batch.masks["completion"], batch.tokens["policy"]["completion"]
        got = run(SFTLoss(loss_type="dft"), batch).grads["completion"]
        expected = -logps.exp().where(mask, 0.0) / mask.sum().clamp(min=1)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)

    def z_gradient(batch: Batch) -> None:
        batch.tokens.pop("weights", None)
        mask, log_z = batch.masks["completion"], batch.tokens["log_z"]["completion"]
        plain, loss = run(SFTLoss(), batch), run(SFTLoss(z_loss_coef=0.01), batch)
        expected = 0.02 * log_z.where(mask, 0.0) / mask.sum().clamp(min=1)
        torch.testing.assert_close(loss.grads["completion log_z"], expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(loss.grads["completion"], plain.grads["completion"], rtol=1e-12, atol=0)
        laws.close(laws.value(SFTLoss(z_loss_coef=0.0), batch), plain.loss.item())

    for law in (gradient_of_minus_p, z_gradient):
        keeps(law, "sequence")
