"""The cases of what learns from answers that are there: SFT, pairs, labelled examples, lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from logratio.losses import DPO_TYPES

from .case import Case


def sft_cases() -> Iterator[Case]:
    yield Case("sft", {"loss_type": "nll"}, "sft")
    yield Case("sft", {"loss_type": "dft"}, "sft")
    yield Case("sft", {"loss_type": "eaft"})
    yield Case("sft", {"loss_type": "eaft", "eaft_alpha": 2.0})
    for beta in (0.0, 0.1, 1.0):
        yield Case("sft", {"loss_type": "gkd", "gkd_beta": beta, "gkd_temperature": 0.7})
    yield Case("sft", {"loss_type": "gkd"}, weighted=True)
    yield Case("sft", {"loss_type": "asft", "asft_alpha": 1.0})
    for loss_type in ("nll", "dft", "eaft", "asft"):
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
