"""Every variant of every loss with the options that matter to it: what is verified, held to the laws, and compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from logratio.losses import DPO_TYPES, LOSSES, GRPOLoss, Loss

CISPO_CAP = GRPOLoss(loss_type="cispo").epsilons[1]
"""Our default of cispo's epsilon_high."""


@dataclass(frozen=True)
class Case:
    """A loss and its options; how TRL is asked for the same, or why it cannot be.

    trl: the trainer, None where TRL has no such loss. differs: why TRL's value is another one although it has the loss.
    state: what the loss carries from earlier steps. weighted: rows have token weights. sampled: rollouts were drawn by
    another policy than the old one. by_token: tokens have advantages of their own. kept: so many words that most tokens
    could have been, the others of all; None: all.
    """

    method: str
    options: dict[str, Any]
    trl: str | None = None
    differs: str = ""
    state: dict[str, float] = field(default_factory=dict)
    weighted: bool = False
    sampled: bool = False
    by_token: bool = False
    kept: int | None = None

    @property
    def loss(self) -> Loss:
        return LOSSES[self.method](**self.options)

    @property
    def trl_options(self) -> dict[str, Any]:
        """The options as TRL's configuration takes them: rloo and gmpo are trainers there, not loss types."""
        own = {"loss_type"} if self.trl in ("rloo", "gmpo") else set()
        cap = {"epsilon_high": CISPO_CAP} if self.options.get("loss_type") == "cispo" else {}  # TRL's default: 0.2
        given = {n: list(v) if isinstance(v, tuple) else v for n, v in (cap | self.options).items() if n not in own}
        if not self.sampled:
            return given
        others = {name: value for name, value in given.items() if not name.startswith("sampling_")}
        return others | trl_correction(**self.options)

    @property
    def name(self) -> str:
        """The loss type (or the method, where it has none) and the other options."""
        loss_type = self.options.get("loss_type", self.method)
        words = ["+".join(loss_type) if isinstance(loss_type, tuple) else loss_type]
        for key, value in self.options.items():
            if key != "loss_type":
                words.append(f"{key}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}")
        words += ["weighted rows"] if self.weighted else []
        words += ["token advantages"] if self.by_token else []
        words += [f"support of {self.kept} words"] if self.kept else []
        words += ["sampled by another"] if self.sampled and "sampling_correction" not in self.options else []
        return ",".join(words)


AS_MASKS = {"icepop": {"sampling_clip_min": 0.5, "sampling_clip_max": 5.0}, "decoupled": {"sampling_clip_max": 1e9}}
"""Corrections that are TRL's token_mask with bounds of their own."""


def trl_correction(sampling_correction: str = "none", **options: Any) -> dict[str, Any]:
    """How TRL is asked for it."""
    if sampling_correction == "none":
        return {"vllm_importance_sampling_correction": False}
    bounds = AS_MASKS.get(sampling_correction, {}) | options
    asked = {f"vllm_importance_sampling_{x}": bounds.get(f"sampling_{x}") for x in ("clip_min", "clip_max")}
    mode = "token_mask" if sampling_correction in AS_MASKS else sampling_correction
    return {"vllm_importance_sampling_mode": mode} | asked


def sft_cases() -> Iterator[Case]:
    yield Case("sft", {"loss_type": "nll"}, "sft")
    yield Case("sft", {"loss_type": "dft"}, "sft")
    yield Case("sft", {"loss_type": "eaft"})
    yield Case("sft", {"loss_type": "eaft", "eaft_alpha": 2.0})
    for loss_type in ("nll", "dft", "eaft"):
        yield Case("sft", {"loss_type": loss_type, "z_loss_coef": 0.01})
        yield Case("sft", {"loss_type": loss_type}, weighted=True)


SMOOTHING = {"exo_pair": 0.001, "robust": 0.1, "cdpo": 0.1}
"""label_smoothing of loss types that mean little, or are refused, without."""
TRL_DPO = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
OTHER_DPO = ("cdpo", "irpo", "dpop", "cal_dpo", "r_dpo", "chi_po", "rainbow", "beta_dpo")
OPTIONS_APART = (
    *("ipo_sum", "alpha_dpo", "dr_dpo", "odpo", "modpo", "sppo", "cauchy", "focal_po", "h_dpo", "dpo_shift", "bpo"),
    *("minor_dpo", "c2_dpo", "sba", "mallows"),
)
"""Variants whose formulas see nothing of LD-DPO and WPO that others do not."""
DIVERGENT = ("ipo_sum", "sba", "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")


def dpo_cases() -> Iterator[Case]:
    refused = {
        "sft": "TRL multiplies an expanded scalar in place: RuntimeError",
        "hinge": "TRL multiplies relu's output in place, which its backward needs: RuntimeError",
    }
    for name in (*TRL_DPO, *OTHER_DPO, *OPTIONS_APART):
        plain: dict[str, Any] = {"loss_type": name} | (
            {"label_smoothing": SMOOTHING[name]} if name in SMOOTHING else {}
        )
        trl = "dpo" if name in TRL_DPO else None
        state = {"margin": 0.3} if name == "beta_dpo" else {}
        yield Case("dpo", plain, trl, state=state)
        if name != "sft" and name not in OPTIONS_APART:
            yield Case("dpo", plain | {"ld_alpha": 0.5}, trl, state=state)
        if DPO_TYPES[name].pairwise and name not in OPTIONS_APART:
            options = plain | {"use_weighting": True}
            yield Case("dpo", options, trl, refused.get(name, ""), state=state)
        if name in DIVERGENT:
            for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
                # with its own tau discopop's slope changes its sign where these scores are: ill-conditioned
                wide = {"discopop_tau": 0.5} if name == "discopop" else {}
                yield Case("dpo", plain | {"f_divergence_type": divergence} | wide, trl)
    more: list[dict[str, Any]] = [
        {"loss_type": "sigmoid", "beta": 0.5},
        {"loss_type": "exo_pair", "label_smoothing": 0.2, "beta": 0.5},
        {"loss_type": "aot", "label_smoothing": 0.1, "beta": 0.5},
        {"loss_type": "aot_unpaired", "label_smoothing": 0.1, "ld_alpha": 0.0},
        {"loss_type": "discopop", "discopop_tau": 0.5, "beta": 0.5},
        {"loss_type": "ipo", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2},
        {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
        {"loss_type": ("sigmoid", "sft"), "f_divergence_type": "js_divergence", "ld_alpha": 0.5},
        {"loss_type": ("sigmoid", "ipo", "apo_zero"), "use_weighting": True, "ld_alpha": 0.3},
    ]
    yield from (Case("dpo", options, "dpo") for options in more)
    for options in (
        {"loss_type": "irpo", "irpo_alpha": 0.3},
        {"loss_type": "dpop", "dpop_lambda": 5.0, "beta": 0.5},
        {"loss_type": "cal_dpo", "cal_dpo_coef": 0.1, "beta": 0.5},
        {"loss_type": "r_dpo", "r_dpo_alpha": 0.02},
        {"loss_type": "chi_po", "chi_po_r_max": 0.5},
        {"loss_type": "rainbow", "rainbow_mu": 0.9, "rainbow_gamma": 0.4, "beta": 2.0},
        {"loss_type": "beta_dpo", "beta_dpo_coef": 0.1, "beta_dpo_momentum": 0.5},
        {"loss_type": "alpha_dpo", "alpha_dpo_coef": 0.5, "rainbow_gamma": 0.4, "beta": 2.0},
        {"loss_type": "dr_dpo", "dr_dpo_beta": 0.1, "beta": 0.5},
        {"loss_type": "odpo", "odpo_alpha": 0.3, "beta": 0.5},
        {"loss_type": "modpo", "modpo_weight": 0.9},
        {"loss_type": "focal_po", "focal_po_gamma": 1.0},
        {"loss_type": "h_dpo", "h_dpo_alpha": 1.2},
        {"loss_type": "dpo_shift", "rejected_weight": 0.5},
        {"loss_type": "bpo", "rejected_weight": 0.3, "beta": 0.5, "ld_alpha": 0.5},
        {"loss_type": "c2_dpo", "c2_dpo_lambda": 0.01, "beta": 0.5},
        {"loss_type": "sba", "sba_lambda": 0.0},
        {"loss_type": "sba", "sba_lambda": 1.0, "ld_alpha": 0.5},
        {"loss_type": "sigmoid", "down_sample": True},
        {"loss_type": ("mallows", "aot"), "mallows_max_entropy": 3.0, "mallows_phi": 1.0, "down_sample": True},
        {"loss_type": ("aot", "sft"), "down_sample": True, "humanline_clip": (-0.3, 0.4)},
        {"loss_type": ("cauchy", "sppo"), "use_weighting": True},
        {"loss_type": ("dr_dpo", "odpo"), "loss_weights": (0.5, 2.0)},
        {"loss_type": "sigmoid", "reference_free": True},
        {"loss_type": "sigmoid_norm", "reference_free": True, "use_weighting": True, "ld_alpha": 0.5},
        {"loss_type": ("sigmoid", "sft"), "humanline_clip": (-0.3, 0.4), "f_divergence_type": "js_divergence"},
        {"loss_type": "aot", "humanline_clip": (-0.3, 0.4), "ld_alpha": 0.5},
    ):
        yield Case("dpo", options)


def kto_cases() -> Iterator[Case]:
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    for name, trl in (("kto", "kto"), ("apo_zero_unpaired", "kto"), ("bco", None)):
        state = {"reward_sum": 0.7, "num_examples": 9.0} if name == "bco" else {}
        for options in ({}, weights, {"beta": 0.5}):
            yield Case("kto", {"loss_type": name} | options, trl, state=state)
        yield Case("kto", {"loss_type": name}, state=state, weighted=True)
        yield Case("kto", {"loss_type": name, "humanline_clip": (-0.3, 0.4)}, state=state)


def cpo_cases() -> Iterator[Case]:
    """CPO, TPO and ORPO."""
    for name in ("sigmoid", "hinge", "ipo", "simpo", "alphapo", "simper"):
        trl = None if name == "simper" else "cpo"
        no_nll = "TRL sets cpo_alpha to 0 for alphapo, whatever was asked" if name == "alphapo" else ""
        overflow = "TRL raises P^-alpha of the whole sequence, which overflows" if name in ("sigmoid", "hinge") else ""
        yield Case("cpo", {"loss_type": name}, trl)
        smoothed = {"label_smoothing": 0.1} if name in ("sigmoid", "simpo", "alphapo") else {}
        steep = {} if name == "simper" else {"beta": 0.5}
        wide = {"simpo_gamma": 0.2} if name in ("simpo", "alphapo") else {}
        yield Case("cpo", {"loss_type": name, "cpo_alpha": 0.3} | steep | smoothed, trl, no_nll)
        yield Case("cpo", {"loss_type": name, "alpha": 0.05} | wide, trl, overflow)
    for name in ("sigmoid", "hinge", "ipo", "tpo-l"):
        yield Case("tpo", {"loss_type": name}, "tpo")
        smoothed = {"label_smoothing": 0.1} if name in ("sigmoid", "tpo-l") else {}
        wide = {"tpo_l_gamma": 0.2} if name == "tpo-l" else {}
        yield Case("tpo", {"loss_type": name, "beta": 0.5, "tpo_alpha": 0.3} | smoothed, "tpo")
        yield Case("tpo", {"loss_type": name, "tpo_alpha": 0.0} | wide, "tpo")
    yield Case("orpo", {}, "orpo")
    yield Case("orpo", {"beta": 1.0}, "orpo")


def listwise_cases() -> Iterator[Case]:
    for name in ("infonca", "nca", "exo_rw", "plackett_luce"):
        yield Case("listwise", {"loss_type": name})
        yield Case("listwise", {"loss_type": name, "beta": 0.5})
        if name != "plackett_luce":
            yield Case("listwise", {"loss_type": name, "temperature_alpha": 0.2})


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
    yield Case("grpo", prime, sampled=True)
    yield Case(
        "grpo",
        prime | {"sampling_correction": "ipo", "sampling_clip_min": -1e-3, "sampling_clip_max": 1e-3},
        sampled=True,
    )


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
    *(*grpo_cases(), *parts_cases(), *later_cases(), *sampling_cases(), *support_cases()),
]
