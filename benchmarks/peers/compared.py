"""What the atlas compares: our options, how TRL is asked for the same, and Liger where it has the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .case import CISPO_CAP, Case, trl_correction

Asked = tuple[str, dict[str, Any]]
"""A trainer of TRL or a loss class of Liger, and its options."""


@dataclass(frozen=True)
class Compared:
    """One row of the atlas for each peer that has the loss."""

    method: str
    options: dict[str, Any]
    trl: Asked | None = None
    liger: Asked | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """Method, loss type and options, or the label."""
        return f"{self.method} {self.label or Case(self.method, self.options).name}"


def same(method: str, liger: Asked | None = None, **options: Any) -> Compared:
    """The same names in TRL."""
    return Compared(method, options, (method, options), liger)


def _sft_and_dpo() -> Iterator[Compared]:
    for name in ("nll", "dft"):
        yield same("sft", loss_type=name)
    smoothing = {"exo_pair": 0.1, "robust": 0.1}
    in_liger = ("sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
    for name in (*in_liger, "discopop"):
        options: dict[str, Any] = {"loss_type": name}
        if name in smoothing:
            options["label_smoothing"] = smoothing[name]
        yield same("dpo", ("DPO", options), **options)
    for name in ("ipo", "sigmoid_norm", "aot", "aot_unpaired", "sft"):
        yield same("dpo", loss_type=name)
    yield same("dpo", loss_type="aot", label_smoothing=0.1)
    for name in ("forward_kl", "js_divergence", "alpha_divergence"):
        yield same("dpo", loss_type="sigmoid", f_divergence_type=name)
    yield same("dpo", loss_type="sigmoid", ld_alpha=0.5)
    yield same("dpo", loss_type="sigmoid", use_weighting=True)
    yield same("dpo", loss_type=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0))
    yield same("dpo", loss_type=("sigmoid", "sft"), use_weighting=True)
    smoothed = {"label_smoothing": 0.1}
    asked = {"loss_type": "sigmoid"} | smoothed
    yield Compared("dpo", {"loss_type": "cdpo"} | smoothed, ("dpo", asked), ("DPO", asked), "sigmoid with e = 0.1")


def _kto_and_orpo() -> Iterator[Compared]:
    plain = {"use_ref_model": True}
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    yield same("kto", ("KTO", plain | {"kl": True}), loss_type="kto")
    yield same("kto", ("KTO", plain | {"kl": True}), loss_type="kto", **weights)
    yield same("kto", ("KTO", plain), loss_type="apo_zero_unpaired")
    yield same("orpo", ("ORPO", {}))
    yield same("orpo", ("ORPO", {"beta": 1.0, "nll_target": True}), beta=1.0)


def _cpo_and_tpo() -> Iterator[Compared]:
    no_nll = {"compute_nll_loss": False}
    yield same("cpo", ("CPO", {}), loss_type="sigmoid")
    yield same("cpo", ("CPO", {"label_smoothing": 0.1}), loss_type="sigmoid", label_smoothing=0.1)
    yield same("cpo", ("CPO", no_nll), loss_type="sigmoid", cpo_alpha=0.0)
    yield same("cpo", loss_type="hinge")
    yield same("cpo", loss_type="ipo")
    yield same("cpo", ("SimPO", {}), loss_type="simpo")
    yield same("cpo", ("SimPO", no_nll), loss_type="simpo", cpo_alpha=0.0)
    yield same("cpo", loss_type="alphapo", alpha=0.25)
    yield same("cpo", loss_type="alphapo", alpha=0.25, cpo_alpha=1.0)
    for name in ("sigmoid", "hinge", "ipo", "tpo-l"):
        yield same("tpo", loss_type=name)
    yield same("tpo", loss_type="sigmoid", tpo_alpha=0.0)


CAP = {"cispo": {"epsilon_high": CISPO_CAP}}
"""Asked of the peers, whose default is another."""


def _grpo() -> Iterator[Compared]:
    off = {"beta": 0.0}
    for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"):
        options: dict[str, Any] = {"loss_type": name}
        if name == "dr_grpo":
            options["max_completion_length"] = 64
        asked = options | CAP.get(name, {})
        yield Compared("grpo", options, ("grpo", asked), ("GRPO", asked | off))
    told = off | {"num_items_in_batch": True}
    for name in ("dapo", "cispo", "vespo"):
        options = {"loss_type": name}
        yield Compared(
            "grpo", options, None, ("GRPO", options | told | CAP.get(name, {})), f"{name} (num_items_in_batch)"
        )
    for name in ("grpo", "dapo", "luspo", "cispo", "sapo"):
        options = {"loss_type": name, "importance_sampling_level": "sequence"}
        asked = options | CAP.get(name, {})
        yield Compared("grpo", options, ("grpo", asked), ("GRPO", asked | off))
    yield Compared("grpo", {"loss_type": "cispo"}, ("grpo", {"loss_type": "cispo"}), None, "cispo (defaults)")
    corrected = {"use_bias_correction_kl": True}
    options = {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.04}
    yield same("grpo", ("GRPO", options | corrected), **options)
    for name in ("grpo", "dapo"):
        options = {"loss_type": name, "beta": 0.04}
        yield same("grpo", ("GRPO", options | corrected), **options)
    options = {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}
    yield same("grpo", ("GRPO", options), **options)
    yield same("grpo", ("GRPO", off | {"loss_type": "grpo", "delta": 1.1}), loss_type="grpo", delta=1.1)
    yield Compared("grpo", {}, ("grpo", {}), ("GRPO", {}), "(defaults)")
    yield same("grpo", loss_type="dapo", epsilon_high=0.28)
    yield same("grpo", loss_type="dapo", off_policy_mask_threshold=0.0)
    yield same("grpo", loss_type="dapo", top_entropy_quantile=0.4)
    yield same("grpo", loss_type="dapo", entropy_coef=0.1)
    yield same("grpo", loss_type="dapo", entropy_coef=0.1, top_entropy_quantile=0.4)
    yield from _sampled()
    yield Compared("grpo", {"loss_type": "gmpo"}, ("gmpo", {}), None, "gmpo (defaults)")
    wide = {"epsilon": 0.4, "beta": 0.04}
    yield Compared("grpo", {"loss_type": "gmpo"} | wide, ("gmpo", wide))
    yield Compared("grpo", {"loss_type": "rloo"}, ("rloo", {}))


def _sampled() -> Iterator[Compared]:
    """Corrections for what another policy sampled."""
    narrow = {"sampling_clip_min": 0.8, "sampling_clip_max": 1.2}
    for name, correction, bounds in (
        ("dapo", "token_truncate", narrow),
        ("dapo", "token_mask", narrow),
        ("dapo", "sequence_truncate", narrow),
        ("dapo", "sequence_mask", {}),
        ("dapo", "icepop", narrow),
        ("dapo", "decoupled", {}),
        ("vespo", "token_truncate", narrow),
    ):
        asked = {"loss_type": name} | trl_correction(correction, **bounds)
        yield Compared("grpo", {"loss_type": name, "sampling_correction": correction} | bounds, ("grpo", asked))


ATLAS: list[Compared] = [*_sft_and_dpo(), *_kto_and_orpo(), *_cpo_and_tpo(), *_grpo()]
