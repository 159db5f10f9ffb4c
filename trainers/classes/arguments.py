"""`SFTConfig`, `DPOConfig`, ...: what TRL's of the same name take, by the names of any age.

Every option is judged when the object is made (`trl_names`): taken, translated, without effect, or refused with a
reason. What is not given has TRL's default, where TRL has the option; the verdicts are in `judged`.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UserError
from ..trl_names import TRL_DEFAULTS, Judged, judge


class Arguments:
    """Options of one method. output_dir: as in TRL the first, and the only one without a name."""

    method = ""
    like = ""
    """The method of TRL whose defaults are meant, where it has none of this name."""

    def __init__(self, output_dir: str | None = None, **options: Any) -> None:
        if output_dir is not None:
            options["output_dir"] = output_dir
        self.given: dict[str, Any] = options
        # TRL's configs have no lora_r, so here it is ours, and asks for adapters as on the command line.
        words = {"lora_r": options["lora_r"]} if options.get("lora_r") and "use_peft" not in options else {}
        self.judged: Judged = judge(
            self.method, self.to_dict(), gpu=torch.cuda.is_available(), words=words, source=type(self).__name__
        )

    def defaults(self) -> dict[str, Any]:
        """TRL's, of what is not given: bf16 where the GPU has it and fp16 is not asked for."""
        found = {
            name: value for name, value in TRL_DEFAULTS[self.like or self.method].items() if name not in self.given
        }
        if self.given.get("fp16") or not (torch.cuda.is_available() and torch.cuda.is_bf16_supported()):
            found.pop("bf16", None)
        if "batch_size" in self.given:
            found.pop("per_device_train_batch_size", None)
        return found

    def __getattr__(self, name: str) -> Any:
        for known in (self.__dict__.get("given", {}), TRL_DEFAULTS.get(type(self).like or type(self).method, {})):
            if name in known:
                return known[name]
        raise AttributeError(f"{type(self).__name__} was given no {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """What was given, and TRL's defaults that go with it."""
        return {**self.defaults(), **self.given}

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.given.items())
        return f"{type(self).__name__}({said})"


def arguments_of(kind: type[Arguments], args: Any) -> Arguments:
    """args, or what a trainer is to do without. UserError for another's."""
    if args is None:
        return kind()
    if not isinstance(args, kind):
        theirs = type(args)
        raise UserError(
            f"args must be a logratio.trainers.{kind.__name__}, got {theirs.__module__}.{theirs.__qualname__}: import "
            "it from where the trainer is imported from"
        )
    return args


class SFTConfig(Arguments):
    """Options of `SFTTrainer`."""

    method = "sft"


class DPOConfig(Arguments):
    """Options of `DPOTrainer`."""

    method = "dpo"


class KTOConfig(Arguments):
    """Options of `KTOTrainer`."""

    method = "kto"


class ORPOConfig(Arguments):
    """Options of `ORPOTrainer`."""

    method = "orpo"


class CPOConfig(Arguments):
    """Options of `CPOTrainer`."""

    method = "cpo"


class TPOConfig(Arguments):
    """Options of `TPOTrainer`."""

    method = "tpo"


class ListwiseConfig(Arguments):
    """Options of `ListwiseTrainer`, which TRL has not: its defaults are those of DPO's."""

    method = "listwise"
    like = "dpo"


class GRPOConfig(Arguments):
    """Options of `GRPOTrainer`."""

    method = "grpo"


class RLOOConfig(Arguments):
    """Options of `RLOOTrainer`."""

    method = "rloo"
