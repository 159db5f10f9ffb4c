"""All options of a run, and what they say to each other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from logratio.losses import GRPO_TYPES, LOSSES, GRPOLoss, Kind, Loss

from ..errors import UserError
from .data import DataConfig
from .model import ModelConfig
from .rollout import NEEDS_ADAPTERS, RolloutConfig
from .save import SaveConfig
from .train import TrainConfig

# Options that say how a run is begun, not what it is.
ONCE = frozenset({"overwrite_output_dir", "resume_from_checkpoint"})


def parts_of(loss: type[Loss]) -> dict[str, type[Any]]:
    """The sections of a run with this loss, whose fields are its options."""
    parts: dict[str, type[Any]] = {"loss": loss, "model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    parts["save"] = SaveConfig
    if loss.kind is Kind.GROUPED:
        parts["rollout"] = RolloutConfig
    return parts


def check_own(loss: type[Loss]) -> None:
    """Raise UserError for a class of the user's own whose fields cannot be options."""
    name, parts = f"{loss.__module__}:{loss.__qualname__}", parts_of(loss)
    taken = {f.name for part, fields in parts.items() if part != "loss" for f in dataclasses.fields(fields)}
    for own in dataclasses.fields(loss):
        if own.name in taken:
            raise UserError(f"--loss {name}: --{own.name} is an option of every such run already; rename its field")
        if own.default is dataclasses.MISSING and own.default_factory is dataclasses.MISSING:
            raise UserError(f"--loss {name}: its field {own.name} needs a default")
    check_longest(loss)


def check_longest(loss: type[Loss]) -> None:
    """Raise UserError for a loss over rollouts that does not say how long they may become."""
    if loss.kind is Kind.GROUPED and "max_completion_length" not in {f.name for f in dataclasses.fields(loss)}:
        raise UserError(
            f"{loss.__name__} is a loss over rollouts, and needs a field max_completion_length: int = 512, in tokens, "
            "which is how long they may become"
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of it. `rollout` is of losses whose kind is GROUPED; None: its defaults."""

    method: str
    loss: Any
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    rollout: RolloutConfig | None = None

    def __post_init__(self) -> None:
        model, data, train, save = self.model, self.data, self.train, self.save
        if not self.wants_reference:
            for name in ("sync_ref_model", "precompute_ref_log_probs", "ref_model_name_or_path"):
                if value := getattr(model, name):
                    given = f"--{name}" if value is True else f"--{name} {value}"
                    raise UserError(f"{given} is about the reference, but this {self.method} has none; leave it out")
        self._check_teacher()
        adapters = model.lora_r or model.adapter_name_or_path
        if self.rollout is not None and self.rollout.rollout_engine == "vllm" and not adapters:
            raise UserError(NEEDS_ADAPTERS)
        if data.dataset_text_field != "text" and self.loss.kind is not Kind.SEQUENCE:
            raise UserError(
                f"--dataset_text_field {data.dataset_text_field} is of texts that sft learns whole, and this is "
                f"{self.method}; leave it out"
            )
        if (train.eval_steps or train.eval_on_start) and not data.evaluates:
            option = f"--eval_steps {train.eval_steps}" if train.eval_steps else "--eval_on_start"
            raise UserError(f"{option} has nothing to evaluate on: add --eval_size or --dataset_test_split")
        if self.rollout is not None and self.rollout.num_generations_eval and not data.evaluates:
            raise UserError(
                f"--num_generations_eval {self.rollout.num_generations_eval} is of evaluations, and there is nothing "
                "to evaluate on: add --eval_size or --dataset_test_split"
            )
        if save.compares and not train.eval_steps:
            option = "load_best_model_at_end" if save.load_best_model_at_end else "early_stopping_patience"
            raise UserError(f"--{option} compares evaluations: add --eval_steps")
        if save.compares and self.rollout is not None and save.metric == "eval_loss":
            raise UserError(
                "evaluations of rollouts have no loss to compare: add --metric_for_best_model reward, or another "
                "metric of them"
            )
        if train.overwrite_output_dir and save.resume_from_checkpoint:
            raise UserError(
                "--overwrite_output_dir removes what --resume_from_checkpoint goes on from; leave one of them out"
            )
        check_longest(type(self.loss))

    def _check_teacher(self) -> None:
        """UserError for a teacher that nothing reads, or what does not go with one."""
        named, rollout = self.model.teacher_model_name_or_path, self.rollout
        taught = self.loss.divergence is not None and not self.anchored
        if not named:
            if rollout is not None and rollout.teacher_coef is not None:
                raise UserError(
                    f"--teacher_coef {rollout.teacher_coef} is read only with --teacher_model_name_or_path; add it, or "
                    "leave this out"
                )
            if taught:
                raise UserError(
                    f"--loss_type {self.loss.loss_type} is a divergence from a teacher: name it with "
                    "--teacher_model_name_or_path"
                )
            return
        if rollout is None:
            if not taught:
                raise UserError(
                    f"--teacher_model_name_or_path {named} is read by grpo, and by sft with --loss_type gkd, but not "
                    f"by this {self.method}; leave it out"
                )
            return
        if rollout.dynamic_sampling > 1:
            raise UserError(
                f"--dynamic_sampling {rollout.dynamic_sampling} leaves out completions of equal reward, from which a "
                "teacher teaches too; leave it out"
            )
        loss = self.loss
        if isinstance(loss, GRPOLoss) and not GRPO_TYPES[loss.loss_type].of_tokens:
            raise UserError(
                f"--loss_type {loss.loss_type} is of whole completions, and a teacher's advantage is of tokens: take "
                "another"
            )
        if getattr(loss, "importance_sampling_level", None) == "sequence":
            raise UserError(
                "--importance_sampling_level sequence has one ratio a completion, and a teacher's advantage is of "
                "tokens: take sequence_token, or leave it out"
            )

    def resolved(self, num_processes: int) -> RunConfig:
        """With every default filled in that depends on other options, the method or the number of processes."""
        rollout = self.rollout or (RolloutConfig() if self.loss.kind is Kind.GROUPED else None)
        completions = rollout.num_generations if rollout else 1
        rollout = rollout and rollout.resolved(self.train.gradient_accumulation_steps)
        if rollout and rollout.teacher_coef is None and self.model.teacher_model_name_or_path:
            rollout = dataclasses.replace(rollout, teacher_coef=1.0)
        train = self.train.resolved(self.method, num_processes, completions)
        return dataclasses.replace(self, model=self.model.resolved(self.loss), train=train, rollout=rollout)

    @property
    def wants_reference(self) -> bool:
        """Whether the loss or the rewards compare with a reference model."""
        return self.loss.wants_reference or (self.rollout is not None and self.rollout.reward_kl_coef > 0)

    @property
    def anchored(self) -> bool:
        """Whether the loss compares the next word's distribution with that of the model that training starts from."""
        return self.loss.divergence is not None and self.loss.divergence.anchored

    @property
    def keeps_start(self) -> bool:
        """Whether what training starts from stays beside what trains, to compare with."""
        return self.anchored or (self.wants_reference and self.model.ref_model_name_or_path is None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for run_config.json, which `--config` takes; without how it was begun (`ONCE`)."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in parts.items()}  # type: ignore[arg-type]
        for options in (plain["train"], plain["save"]):
            for name in ONCE & options.keys():
                del options[name]
        return {"method": plain.pop("method"), "loss_class": self.loss_class, **plain}

    @property
    def loss_class(self) -> str:
        """The loss as `--loss` takes it: its registered name, or module:Class."""
        kind = type(self.loss)
        own = f"{kind.__module__}:{kind.__qualname__}"
        return next((name for name, known in LOSSES.items() if known is kind), own)
