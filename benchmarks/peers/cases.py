"""Every variant of every loss with the options that matter to it: what is verified, held to the laws, and compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from .case import Case
from .cases_offline import cpo_cases, dpo_cases, kto_cases, listwise_cases, sft_cases

CLIPPED = ("grpo", "dapo", "dr_grpo", "bnpo", "luspo")
TRL_GRPO = (*CLIPPED, "cispo", "sapo", "vespo")


def grpo_cases() -> Iterator[Case]:
    levels = ("token", "sequence")
    at_levels = [x for x in itertools.product(TRL_GRPO, levels) if x != ("vespo", "sequence")]
    for (name, level), beta in itertools.product(at_levels, (0.0, 0.04)):
        yield Case("grpo", {"loss_type": name, "importance_sampling_level": level, "beta": beta}, "grpo")
    for name, level in at_levels:
        plain = {"loss_type": name, "importance_sampling_level": level}
        yield Case("grpo", plain | {"top_entropy_quantile": 0.4, "beta": 0.04}, "grpo")
        yield Case("grpo", plain | {"off_policy_mask_threshold": 0.02, "beta": 0.04}, "grpo")
    for name, level, delta in itertools.product(CLIPPED, levels, (1.1, 4.0)):
        yield Case("grpo", {"loss_type": name, "importance_sampling_level": level, "delta": delta}, "grpo")
    for options in (
        {"loss_type": "dapo", "beta": 0.04, "use_bias_correction_kl": False, "epsilon_high": 0.28},
        {"loss_type": "grpo", "entropy_coef": 0.1},
        {"loss_type": "dapo", "entropy_coef": 0.1, "top_entropy_quantile": 0.4},
        {"loss_type": "cispo", "epsilon_high": 1.2},
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5},
        {
            "loss_type": "vespo",
            "vespo_k_pos": 1.5,
            "vespo_lambda_pos": 1.0,
            "vespo_k_neg": 2.5,
            "vespo_lambda_neg": 1.5,
        },
    ):
        yield Case("grpo", options, "grpo")
    for name, trl in (("gmpo", "gmpo"), ("rloo", "rloo")):
        yield Case("grpo", {"loss_type": name}, trl)
        yield Case("grpo", {"loss_type": name, "epsilon": 0.1, "epsilon_high": 0.4}, trl)
    yield Case("grpo", {"loss_type": "gmpo", "beta": 0.04}, "gmpo")
    yield Case("grpo", {"loss_type": "gmpo", "top_entropy_quantile": 0.4, "epsilon": 0.4}, "gmpo")
    for estimator in ("k1", "k2", "k3+", "abs"):
        yield Case("grpo", {"loss_type": "grpo", "beta": 0.04, "kl_estimator": estimator})
        yield Case(
            "grpo", {"loss_type": "dapo", "beta": 0.04, "kl_estimator": estimator, "use_bias_correction_kl": False}
        )


def parts_cases() -> Iterator[Case]:
    """GRPO's parts chosen apart: normalisers, levels, advantages of tokens."""
    for name, aggregation in (
        ("dapo", "sequence_mean"),
        ("grpo", "sequence_sum"),
        ("luspo", "constant_length"),
        ("sapo", "token_mean"),
        *((name, "prompt_mean") for name in ("dapo", "cispo", "sapo", "vespo")),
    ):
        yield Case("grpo", {"loss_type": name, "loss_aggregation": aggregation})
    yield Case("grpo", {"loss_type": "dapo", "loss_aggregation": "prompt_mean", "beta": 0.04, "entropy_coef": 0.1})
    for name in ("grpo", "cispo", "sapo"):
        options = {"loss_type": name, "importance_sampling_level": "sequence_token"}
        yield Case("grpo", options)
        yield Case("grpo", options | {"beta": 0.04}, by_token=True)
    for name in ("dapo", "cispo", "sapo"):
        yield Case("grpo", {"loss_type": name}, by_token=True)
    yield Case("grpo", {"loss_type": "dapo", "off_policy_mask_threshold": 0.02}, sampled=True, by_token=True)
    yield Case("grpo", {"loss_type": "dapo", "sampling_correction": "dppo_tv"}, sampled=True, by_token=True)


def later_cases() -> Iterator[Case]:
    """GRPO's variants that TRL has not."""
    for name in ("reinforce", "topr", "kimi", "cfpo", "pspo", "prime", "fipo"):
        yield Case("grpo", {"loss_type": name})
        yield Case("grpo", {"loss_type": name, "beta": 0.04})
    for name in ("cfpo", "pspo"):
        yield Case("grpo", {"loss_type": name, "importance_sampling_level": "sequence"})
    options: list[dict[str, Any]] = [
        {"loss_type": "cispo", "epsilon": 0.1, "epsilon_high": 1.2},
        {"loss_type": "kimi", "log_ratio_coef": 0.5},
        {"loss_type": "cfpo", "epsilon": 0.5, "loss_aggregation": "token_mean"},
        {"loss_type": "pspo", "pspo_alpha": 0.4},
        {"loss_type": "fipo", "fipo_half_life": 2.0, "fipo_clip": 0.5, "delta": 1.3},
    ]
    yield from (Case("grpo", one) for one in options)
    for name in ("dapo", "gmpo", "rloo", "vespo"):
        yield Case("grpo", {"loss_type": name, "positive_nll_coef": 0.1})
    yield Case("grpo", {"loss_type": "dapo", "positive_nll_coef": 0.5, "top_entropy_quantile": 0.4}, by_token=True)
    yield Case("grpo", {"loss_type": "fipo"}, by_token=True)
    prime = {"loss_type": "prime", "log_ratio_coef": 0.1}
    yield Case("grpo", {"loss_type": "a2po"})
    yield Case("grpo", {"loss_type": "a2po", "a2po_beta": 0.1, "off_policy_mask_threshold": 0.02})
    yield Case("grpo", prime, sampled=True)
    yield Case(
        "grpo",
        prime | {"sampling_correction": "ipo", "sampling_clip_min": -1e-3, "sampling_clip_max": 1e-3},
        sampled=True,
    )


def step_cases() -> Iterator[Case]:
    """GRPO's variants that compare with the whole step, or with the other completions of the prompt."""
    for name in ("m2po", "clip_cov", "kl_cov", "real"):
        yield Case("grpo", {"loss_type": name})
    # far from its target: near it, p - q has the rounding of the completions' sums
    yield Case("grpo", {"loss_type": "target_po", "target_po_temperature": 0.05})
    for name in ("m2po", "clip_cov", "kl_cov"):
        yield Case("grpo", {"loss_type": name, "beta": 0.04, "top_entropy_quantile": 0.4})
        yield Case("grpo", {"loss_type": name}, by_token=True)
    options: list[dict[str, Any]] = [
        {"loss_type": "m2po", "m2po_threshold": 0.01, "loss_aggregation": "sequence_mean"},
        {"loss_type": "clip_cov", "cov_share": 0.1, "clip_cov_low": 0.2, "clip_cov_high": 2.0, "epsilon_high": 0.1},
        {"loss_type": "clip_cov", "cov_share": 0.02, "importance_sampling_level": "sequence", "epsilon": 0.05},
        {"loss_type": "kl_cov", "cov_share": 0.2, "kl_cov_coef": 0.5},
        {"loss_type": "real", "real_temperature": 0.1, "positive_nll_coef": 0.1},
        {"loss_type": "target_po", "target_po_temperature": 0.5, "entropy_coef": 0.1},
    ]
    yield from (Case("grpo", one) for one in options)
    yield Case("grpo", {"loss_type": "m2po"}, sampled=True)
    for name in ("dapo", "cispo"):
        yield Case("grpo", {"loss_type": name, "optimal_token_baseline": True})
    options = [{"loss_aggregation": "prompt_mean", "top_entropy_quantile": 0.4}, {"beta": 0.04, "epsilon": 0.05}]
    yield Case("grpo", {"loss_type": "grpo", "optimal_token_baseline": True} | options[0])
    yield Case("grpo", {"loss_type": "dapo", "optimal_token_baseline": True} | options[1], by_token=True)
    corrected = {"cov_share": 0.1, "sampling_correction": "token_truncate", "sampling_clip_max": 1.2}
    for name in ("clip_cov", "kl_cov"):
        yield Case("grpo", {"loss_type": name} | corrected, sampled=True)


NARROW: dict[str, Any] = {"sampling_clip_min": 0.8, "sampling_clip_max": 1.2}
WIDE: dict[str, Any] = {"sampling_clip_min": 0.5, "sampling_clip_max": 2.0}


def sampling_cases() -> Iterator[Case]:
    """GRPO's corrections, with bounds that some tokens or completions are outside of."""

    def case(name: str, correction: str, trl: str | None = "grpo", **options: Any) -> Case:
        return Case("grpo", {"loss_type": name, "sampling_correction": correction} | options, trl, sampled=True)

    for name in ("dapo", "cispo", "vespo"):
        yield case(name, "token_truncate", **NARROW)
        yield case(name, "token_mask", **NARROW)
    yield case("dapo", "sequence_truncate", sampling_clip_max=1.5)
    yield case("luspo", "sequence_truncate", importance_sampling_level="sequence", **WIDE)
    yield case("dapo", "sequence_mask", **WIDE)
    yield case("grpo", "sequence_mask", importance_sampling_level="sequence", beta=0.04)
    yield case("sapo", "token_mask", top_entropy_quantile=0.4, **NARROW)
    yield case("dr_grpo", "icepop", **NARROW)
    yield case("dapo", "icepop")
    yield case("dapo", "decoupled", beta=0.04, entropy_coef=0.1)
    yield case("dapo", "token_truncate", off_policy_mask_threshold=0.02)
    yield Case("grpo", {"loss_type": "dapo", "off_policy_mask_threshold": 0.02}, "grpo", sampled=True)
    for correction in ("geometric_truncate", "geometric_mask"):
        yield case("dapo", correction, None, sampling_clip_min=0.9, sampling_clip_max=1.1)
    yield case("dapo", "geometric_mask", None)
    yield case("rloo", "sequence_truncate", None, **WIDE)
    yield case("gmpo", "geometric_truncate", None, beta=0.04)
    for correction, width in (("dppo_tv", 1e-3), ("dppo_kl", 1e-4), ("ipo", 1e-3)):
        yield case("dapo", correction, None, sampling_clip_min=-width, sampling_clip_max=width)
    yield case("cispo", "dppo_tv", None)


def support_cases() -> Iterator[Case]:
    """GRPO on the distributions that top-k, top-p or min-p left; in TRL log-probs are of all words."""
    for options, sampled in (
        ({"loss_type": "dapo", "beta": 0.04}, False),
        ({"loss_type": "dapo", "entropy_coef": 0.1, "top_entropy_quantile": 0.4}, False),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, False),
        ({"loss_type": "cispo", "sampling_correction": "token_truncate"} | NARROW, True),
    ):
        yield Case("grpo", options, sampled=sampled, kept=7)


CASES: list[Case] = [
    *(*sft_cases(), *dpo_cases(), *kto_cases(), *cpo_cases(), *listwise_cases()),
    *(*grpo_cases(), *parts_cases(), *later_cases(), *step_cases(), *sampling_cases(), *support_cases()),
]
