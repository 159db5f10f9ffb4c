"""`SFTConfig`, `DPOConfig`, ...: what TRL's of the same name take, by the names of any age.

Every option is judged when the object is made, and again where one is set afterwards (`trl_names`): taken, translated,
without effect, or refused with a reason. What is not given has TRL's default, where TRL has the option; the verdicts
are in `judged`.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property
from typing import Any

import torch

from logratio.losses import LOSSES

from ..config import parts_of
from ..config.train import DEFAULT_LEARNING_RATE, OTHER_LEARNING_RATE
from ..errors import UserError
from ..trl_names import TRL_DEFAULTS, Judged, consider, names_of
from .signatures import takes

OF_THE_PROCESS = frozenset(
    "device n_gpu local_rank process_index local_process_index world_size parallel_mode distributed_state should_log "
    "should_save get_process_log_level main_process_first".split()
)
"""What transformers' TrainingArguments tell of the process, which scripts ask for."""


class Kinds(type):
    """Of the classes of options: what a parser of dataclasses is told that asks them for their fields."""

    def __getattr__(cls, name: str) -> Any:
        if name == "__dataclass_fields__":
            raise AttributeError(
                f"{cls.__name__} is no dataclass: give the parser TRL's {cls.__name__}, which the trainers take too"
            )
        raise AttributeError(f"type object {cls.__name__!r} has no attribute {name!r}")


class Arguments(metaclass=Kinds):
    """Options of one method. output_dir: as in TRL the first, and the only one without a name.

    An option is set afterwards as in TRL, until a trainer's model is loaded. Where it is read it has its default.
    """

    method = ""
    like = ""
    """The method of TRL whose defaults are meant, where it has none of this name."""

    def __init__(self, output_dir: str | None = None, **options: Any) -> None:
        if output_dir is not None:
            options["output_dir"] = output_dir
        self.__dict__["given"] = options
        _ = self.judged  # refused here, if at all

    def __init_subclass__(cls) -> None:
        if vars(cls).get("__annotations__"):
            raise UserError(
                f"{cls.__name__}: a config with fields of your own is one of TRL's: derive it from trl's, which the "
                "trainers take too"
            )
        if "method" in vars(cls):
            takes(cls, ("output_dir",), names_of(cls.method) - {"output_dir"}, rest="options")

    given: dict[str, Any]

    @cached_property
    def judged(self) -> Judged:
        """The verdicts on all that was given, by now."""
        given = self.given
        # TRL's configs have no lora_r, so here it is ours, and asks for adapters as on the command line.
        words = {"lora_r": given["lora_r"]} if given.get("lora_r") and "use_peft" not in given else {}
        gpu = torch.cuda.is_available()
        return consider(self.method, self._meant(), gpu=gpu, words=words).check(type(self).__name__)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            self.__dict__[name] = value
            return
        self.given[name] = value
        self.__dict__.pop("judged", None)  # when all is set: one may be right only beside the next

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
        if "given" in self.__dict__ and not name.startswith("_"):
            if name in OF_THE_PROCESS:
                return getattr(self._process, name)
            if name in (known := self.to_dict()):
                return known[name]
        raise AttributeError(f"{type(self).__name__} was given no {name!r}, and knows no option of that name")

    def _defaults(self) -> dict[str, Any]:
        """Of what neither was given nor is TRL's alone: transformers', which TRL goes by, and ours."""
        from transformers import TrainingArguments

        method = "grpo" if self.method == "rloo" else self.method
        ours = [field for part in parts_of(LOSSES[method]).values() for field in dataclasses.fields(part)]
        rate = {"learning_rate": DEFAULT_LEARNING_RATE.get(method, OTHER_LEARNING_RATE)}
        both = [*ours, *dataclasses.fields(TrainingArguments)]
        made = {f.name: f.default_factory() for f in both if f.default_factory is not dataclasses.MISSING}
        return made | {f.name: f.default for f in both if f.default is not dataclasses.MISSING} | rate

    @cached_property
    def _process(self) -> Any:
        from transformers import TrainingArguments

        cpu = bool(self.given.get("use_cpu")) or not torch.cuda.is_available()
        return TrainingArguments(
            self.output_dir, use_cpu=cpu, ddp_timeout=self.ddp_timeout, log_level=self.log_level, report_to="none"
        )

    def _meant(self) -> dict[str, Any]:
        """What was given, and TRL's defaults that go with it."""
        return {**self.defaults(), **self.given}

    def to_dict(self) -> dict[str, Any]:
        """All options, given or by default."""
        return {**self._defaults(), **self._meant()}

    def told(self) -> list[str]:
        """One line for each option that was given and has another form or no effect here."""
        from ..trl_names.shown import line_of
        from ..trl_names.verdicts import Kind

        kinds = (Kind.TRANSLATED, Kind.NO_EFFECT)
        return [line_of(one).strip() for one in self.judged.verdicts if one.kind in kinds and one.key in self.given]

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.given.items())
        return f"{type(self).__name__}({said})"


def arguments_of(kind: type[Arguments], args: Any) -> Arguments:
    """args, TRL's own of the same name as ours, or what a trainer is to do without. UserError for another's."""
    if args is None or isinstance(args, kind):
        return args or kind()
    for one in type(args).__mro__:
        if one.__name__ == kind.__name__ and one.__module__.startswith("trl."):
            return kind(**said_by(args, one))
    raise UserError(
        f"args must be a logratio.trainers.{kind.__name__}, or TRL's, got {type(args).__module__}."
        f"{type(args).__qualname__}: give its options to {kind.__name__}"
    )


FILLED_IN_BY = frozenset(
    "output_dir use_cpu bf16 fp16 per_device_train_batch_size gradient_accumulation_steps num_generations".split()
)
"""Options by which TRL fills in, or refuses, others."""


def said_by(args: Any, theirs: Any) -> dict[str, Any]:
    """The options of TRL's own object that are other than by default. theirs: the class that it is of, or derived from,
    with fields that are no options."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(theirs) if field.init}
    plain = theirs(**{name: values[name] for name in FILLED_IN_BY & values.keys()})
    said = {name: value for name, value in values.items() if name in FILLED_IN_BY or value != getattr(plain, name)}
    if "steps_per_generation" in said:
        said.pop("generation_batch_size", None)  # computed from it, or it from this
    return said


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
