"""Which variant of GRPO keeps which law: laws 17 and 20 to 24."""

import math
from itertools import product
from typing import Any

import pytest
import torch

from logratio.losses import GRPO_TYPES, KL_ESTIMATORS, GRPOLoss
from logratio.losses.grpo import LEVELS
from logratio.reference import family_laws_grpo as laws
from logratio.reference.family_laws import at_least, equal_lengths, neutral_option, put_role
from logratio.reference.strategies import Batch

from ._families import breaks, keeps

NORMALISERS = {
    "dapo": "token_mean",
    "bnpo": "token_mean",
    "cispo": "token_mean",
    "vespo": "token_mean",
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "gmpo": "sequence_mean",
    "luspo": "sequence_sum",
    "rloo": "sequence_sum",
    "dr_grpo": "constant",
    "reinforce": "token_mean",
    "fipo": "token_mean",
    "prime": "token_mean",
    "cfpo": "sequence_mean",
    "pspo": "sequence_mean",
    "topr": "sequence_sum",
    "kimi": "sequence_sum",
    **dict.fromkeys(("m2po", "clip_cov", "kl_cov"), "token_mean"),
}
APART = {"real", "target_po", "a2po"}
"""Of one term a prompt, or a square: no weighted sum over tokens."""
CLIPPED = ("dapo", "bnpo", "grpo", "luspo", "dr_grpo")
WIDE = {"epsilon": math.nextafter(1, 0), "epsilon_high": 1e6}
UNBOUND = {"epsilon": 1e6, "epsilon_high": 1e6}  # of log-ratios

levels = pytest.mark.parametrize("level", LEVELS)
LEVELED = GRPO_TYPES.readers("importance_sampling_level")


def grpo(name: str, level: str = "token", **options: Any) -> GRPOLoss:
    return GRPOLoss(loss_type=name, importance_sampling_level=level, **options)


def grouped(law: Any, **options: Any) -> None:
    keeps(law, "grouped", **{"distinct": False} | options)


def ungrouped(law: Any, name: str, **options: Any) -> None:
    breaks(law, name, "grouped", **{"distinct": False} | options)


def test_every_type_is_here():
    assert set(NORMALISERS) | APART == set(GRPO_TYPES)


@pytest.mark.parametrize(
    ("name", "level"),
    [*((name, "token") for name in NORMALISERS), *((name, level) for level in [*LEVELS][1:] for name in LEVELED)],
)
def test_law_20_on_policy_it_is_reinforce(name, level):
    """prime: but for its penalty, which is to the sampler; pspo: but for the old policy's share; clip_cov: but for the
    tokens in its range; m2po: where the sampler is the policy, too."""
    normaliser, neutral = NORMALISERS[name], {"prime": {"log_ratio_coef": 0.0}, "pspo": {"pspo_alpha": 0.0}}
    neutral["clip_cov"] = {"clip_cov_low": 1e9, "clip_cov_high": 2e9}
    loss = grpo(name, level, **neutral.get(name, {}))
    sampled = {"behavior": "policy"} if name == "m2po" else {}
    grouped(lambda batch: laws.reinforce_on_policy(loss, put_role(batch, **sampled), normaliser))
    other = "sequence_sum" if normaliser == "token_mean" else "token_mean"
    ungrouped(lambda batch: laws.reinforce_on_policy(loss, batch, other), "reinforce_on_policy")


def test_law_20_is_broken_by_cispo_with_a_cap_below_1():
    capped = grpo("cispo", epsilon_high=0.2)
    ungrouped(lambda batch: laws.reinforce_on_policy(capped, batch, "token_mean"), "reinforce_on_policy")


@levels
@pytest.mark.parametrize("name", CLIPPED)
def test_law_21_a_wide_clip_is_importance_sampling_and_a_lower_bound(name, level):
    wide = grpo(name, level, **WIDE)
    grouped(lambda batch: laws.wide_clip(wide, batch, NORMALISERS[name], level))
    grouped(lambda batch: at_least(grpo(name, level), wide, batch))
    ungrouped(lambda batch: laws.wide_clip(grpo(name, level), batch, NORMALISERS[name], level), "wide_clip")


@pytest.mark.parametrize("name", ["gmpo", "rloo"])
def test_law_21_of_whole_sequences(name):
    wide = UNBOUND if name == "gmpo" else WIDE
    grouped(lambda batch: at_least(grpo(name), grpo(name, **wide), batch))
    if name == "gmpo":  # without a clip it is GSPO without one
        grouped(lambda batch: neutral_option(grpo("gmpo", **UNBOUND), grpo("grpo", "sequence", **WIDE), batch))


@pytest.mark.parametrize("cap", [1.2, 2.0, 4.0])
@pytest.mark.parametrize("name", CLIPPED)
def test_law_21_delta_is_the_dual_clip(name, cap):
    grouped(lambda batch: laws.dual_clip(grpo(name, delta=cap), batch, NORMALISERS[name], 0.8, 1.2, cap))


def test_law_21_a_delta_within_the_clip_is_not():
    ungrouped(lambda batch: laws.dual_clip(grpo("dapo", delta=1.1), batch, "token_mean", 0.8, 1.2, 1.1), "dual_clip")


@pytest.mark.parametrize("name", LEVELED)
def test_law_21_one_token_is_a_sequence(name):
    token, *others = (grpo(name, level) for level in LEVELS)
    for other in others:
        grouped(lambda batch, other=other: neutral_option(token, other, batch), max_tokens=1)


@pytest.mark.parametrize("name", [name for name in LEVELED if name != "fipo"])  # which weighs tokens apart
def test_gspo_token_has_gspos_value_and_gradient_where_a_completion_has_one_advantage(name):
    """arXiv 2507.18071 Sec. 4.3."""
    sequence, token = (grpo(name, level) for level in ("sequence", "sequence_token"))
    grouped(lambda batch: neutral_option(sequence, token, batch))


def test_law_21_one_token_is_a_sequence_of_rloo_and_gmpo():
    grouped(lambda batch: neutral_option(grpo("rloo"), grpo("grpo"), batch), max_tokens=1)
    wide = grpo("gmpo", **UNBOUND)
    grouped(lambda batch: neutral_option(wide, grpo("grpo", **WIDE), batch), max_tokens=1)


def test_normalisers_agree_at_equal_lengths():
    grouped(lambda batch: neutral_option(grpo("bnpo"), grpo("dapo"), batch))
    grouped(lambda batch: neutral_option(grpo("grpo"), grpo("dapo"), equal_lengths(batch)))
    ungrouped(lambda batch: neutral_option(grpo("grpo"), grpo("dapo"), batch), "neutral_option")

    def dr_grpo(batch: Batch) -> None:
        full = equal_lengths(batch)
        length = full.masks["completion"].shape[1]
        neutral_option(grpo("dr_grpo", max_completion_length=length), grpo("grpo"), full)

    grouped(dr_grpo)


PER_TOKEN = ("dapo", "grpo", "sapo", "luspo", "vespo", "dr_grpo", "cispo")


@pytest.mark.parametrize(("name", "estimator"), [*product(PER_TOKEN, KL_ESTIMATORS)])
def test_law_22_kl_estimators(name, estimator):
    for corrected in (True, False):
        loss = grpo(name, beta=0.3, kl_estimator=estimator, use_bias_correction_kl=corrected)

        def law(batch: Batch, loss: GRPOLoss = loss, corrected: bool = corrected) -> None:
            laws.kl_estimators(loss, batch, 0.3, NORMALISERS[name], estimator, corrected)

        grouped(law)


def test_law_22_of_gmpo_is_never_corrected():
    loss = grpo("gmpo", beta=0.3)
    grouped(lambda batch: laws.kl_estimators(loss, batch, 0.3, "sequence_mean", "k3", False))


@pytest.mark.parametrize("name", [*PER_TOKEN, "gmpo"])
def test_law_22_the_estimate_is_not_negative(name):
    for estimator in ("k2", "k3"):
        loss = grpo(name, beta=1.0, kl_estimator=estimator)
        grouped(lambda batch, loss=loss: laws.kl_is_not_negative(loss, batch))
    ungrouped(
        lambda batch: laws.kl_is_not_negative(grpo(name, beta=1.0, kl_estimator="k1"), batch), "kl_is_not_negative"
    )


@pytest.mark.parametrize(
    ("estimator", "corrected", "sampler", "of"),
    [
        ("k3", True, "old", "reverse"),  # rho k3 off policy: KL(policy || ref) and its gradient, exactly
        ("k1", True, "old", "reverse"),
        ("k3", True, "policy", "reverse"),
        ("k2", False, "policy", "reverse"),
        ("k3", False, "policy", "forward"),  # plain k3 pulls towards the other KL
    ],
)
def test_law_22_expectations(estimator, corrected, sampler, of):
    loss = grpo("dapo", beta=1.0, kl_estimator=estimator, use_bias_correction_kl=corrected)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        logits, ref = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        laws.kl_in_expectation(loss, logits, ref, sampler, of)
        other = "forward" if of == "reverse" else "reverse"
        with pytest.raises(AssertionError, match="^kl_in_expectation: "):
            laws.kl_in_expectation(loss, logits, ref, sampler, other)


def test_law_22_k1_as_a_loss_has_no_mean_gradient():
    loss = grpo("dapo", beta=1.0, kl_estimator="k1", use_bias_correction_kl=False)
    zero = torch.zeros(6, dtype=torch.float64)
    laws.kl_in_expectation(loss, zero, zero, "policy", "reverse")  # where the gradient of the KL is 0 as well
    with pytest.raises(AssertionError):
        laws.kl_in_expectation(loss, zero, torch.arange(6.0, dtype=torch.float64), "policy", "reverse")


def test_law_24_sapo_and_vespo():
    loss = grpo("sapo", sapo_temperature_pos=2.0, sapo_temperature_neg=0.5)
    grouped(lambda batch: laws.soft_gate(loss, batch, "sequence_mean", 2.0, 0.5))
    options = {"vespo_k_pos": 1.5, "vespo_lambda_pos": 1.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 3.5}
    laws.gamma_weight(grpo("vespo", **options), 2.0, 1.5, 1.0)
    laws.gamma_weight(grpo("vespo", **options), -0.7, 2.5, 3.5)
    laws.gamma_weight(grpo("vespo"), 1.0, 2.0, 3.0)
    laws.gamma_weight(grpo("vespo"), -1.0, 3.0, 2.0)


@levels
@pytest.mark.parametrize("name", CLIPPED)
def test_law_17_neutral_options(name, level):
    plain = grpo(name, level, beta=0.1)
    for options in (
        {"delta": 1e30},
        {"epsilon_high": 0.2},
        {"off_policy_mask_threshold": 1e30},
        {"entropy_coef": 0.0},
        {"top_entropy_quantile": 1.0},
    ):
        loss = grpo(name, level, beta=0.1, **options)
        grouped(lambda batch, loss=loss: neutral_option(loss, plain, batch))
    off = grpo(name, level, beta=0.1, off_policy_mask_threshold=0.02)
    ungrouped(lambda batch: neutral_option(off, plain, batch), "neutral_option", max_examples=60)


def test_law_17_entropy():
    """Where all entropies are equal all tokens are the top ones; at rho = 0 only the maximum and its ties are."""

    def equal(batch: Batch) -> Batch:
        ones = {part: torch.ones_like(x) for part, x in batch.tokens["entropy"].items()}
        batch.tokens["entropy"] = ones
        return batch

    for share in (0.0, 0.4):
        loss = grpo("dapo", top_entropy_quantile=share)
        grouped(lambda batch, loss=loss: neutral_option(loss, grpo("dapo"), equal(batch)))

    def only_the_maximum(batch: Batch) -> None:
        batch = put_role(batch, old="policy")
        mask, entropy = batch.masks["completion"], batch.tokens["entropy"]["completion"]
        if mask.any():
            top = mask & (entropy == entropy[mask].max())
            grad = laws.run(grpo("dapo", top_entropy_quantile=0.0), batch).grads["completion"]
            expected = -top.double() * batch.rows["advantages"][:, None] / mask.sum()
            torch.testing.assert_close(grad, expected, rtol=1e-9, atol=0)

    grouped(only_the_maximum)
