"""A loss with its options, and how TRL is asked for the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from logratio.losses import LOSSES, GRPOLoss, Loss

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
