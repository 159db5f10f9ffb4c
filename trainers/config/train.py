"""How it is trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from logratio.losses.options import Count, NotNegative, Positive, Range

from ..errors import UserError
from .numbers import NotNegativeSteps, Seed, Steps, check_numbers, check_whole
from .objects import json_object, keep_as_text

# TRL's defaults; every method but SFT starts from a model that can already speak.
DEFAULT_LEARNING_RATE = {"sft": 2e-5, "tpo": 5e-7}
OTHER_LEARNING_RATE = 1e-6
DEFAULT_BATCH_SIZE = 8

Moment = Annotated[float, Range(0, 1, below=True)]
Schedule = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
"""transformers' schedules, but for the two that follow a metric (reduce_lr_on_plateau, greedy)."""
Tracker = Literal["none", "all", "tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "swanlab", "aim", "clearml"]
"""Of accelerate's."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How it is trained."""

    output_dir: str = "runs/latest"
    """Folder for the log, the configuration and the trained model."""
    overwrite_output_dir: bool = False
    """Remove the model and checkpoints that another run left in output_dir; logs and reference log-probs stay."""
    batch_size: Count | None = None
    """Examples of an optimizer step over all processes (default 8): rows for SFT and KTO, pairs for DPO and ORPO,
    lists, prompts for GRPO."""
    per_device_train_batch_size: Count | None = None
    """TRL's spelling: batch_size = this x gradient_accumulation_steps x processes; GRPO: divided by num_generations,
    since TRL counts completions."""
    gradient_accumulation_steps: Count | None = None
    """TRL's spelling, see per_device_train_batch_size."""
    micro_batch_tokens: Count | Literal["auto"] = 8192
    """Tokens of one forward pass on one process, padding included: memory against speed, never the result. auto: 8192,
    and after the first steps as many as the GPU has room for."""
    max_steps: Count | None = None
    """Optimizer steps (default: as many as num_train_epochs takes)."""
    num_train_epochs: Positive = 3.0
    """Passes over the data."""
    learning_rate: NotNegative | None = None
    """Peak learning rate (default: 2e-5 for SFT, 5e-7 for TPO, 1e-6 for the others)."""
    lr_scheduler_type: Schedule = "linear"
    """Learning rate after the warm-up, by transformers' names; constant has none."""
    lr_scheduler_kwargs: str | None = None
    """Options of that schedule, as a JSON object ({"min_lr_rate": 0.1}); in YAML a mapping."""
    warmup_steps: NotNegativeSteps = 0
    """Steps in which the learning rate grows from 0; below 1: that share of all steps."""
    max_grad_norm: NotNegative = 1.0
    """Clip the gradient's norm to this; 0 does not clip."""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay, of matrices only."""
    adam_beta1: Moment = 0.9
    """AdamW's running mean of the gradient: how much of it stays."""
    adam_beta2: Moment = 0.999
    """AdamW's running mean of its square: how much of it stays."""
    adam_epsilon: Positive = 1e-8
    """AdamW's addend in the denominator."""
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw_torch"
    """Optimizer; all but the first are bitsandbytes'."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward pass."""
    eval_steps: Steps | None = None
    """Evaluate every so many steps, below 1: every such share of all (default: at the end only)."""
    eval_on_start: bool = False
    """Evaluate before the first step too: a line of the log for step 0, which is compared with nothing."""
    report_to: tuple[Tracker, ...] = ("none",)
    """Trackers that each line of the log goes to as well; all: every one that is installed."""
    ddp_timeout: Count = 1800
    """Seconds that processes wait for one that does not come, before all end. One that fails ends all at once."""
    seed: Seed = 42
    """Of shuffling, adapters, dropout and rollouts."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_whole(self, "warmup_steps", "eval_steps")
        keep_as_text(self, "lr_scheduler_kwargs")
        given = [name for name in ("warmup_steps", "lr_scheduler_kwargs") if getattr(self, name)]
        if self.lr_scheduler_type == "constant" and given:
            raise UserError(
                f"--{given[0]} {getattr(self, given[0])} is not read by --lr_scheduler_type constant; take "
                "constant_with_warmup, or leave it out"
            )

    @property
    def first_micro_batch_tokens(self) -> int:
        """What a run begins with."""
        return 8192 if self.micro_batch_tokens == "auto" else self.micro_batch_tokens

    @property
    def schedule_options(self) -> dict[str, Any]:
        """What `lr_scheduler_kwargs` says."""
        return json_object(self, "lr_scheduler_kwargs")

    def resolved(self, method: str, num_processes: int, completions: int = 1) -> TrainConfig:
        """With every default that depends on the method or the number of processes filled in, and TRL's spelling of
        batch_size multiplied out. completions: of each example, which TRL counts where it samples them."""
        per_device, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        batch_size = self.batch_size
        if per_device is not None or accumulation is not None:
            product = (per_device or DEFAULT_BATCH_SIZE) * (accumulation or 1) * num_processes
            if product % completions:
                raise UserError(
                    f"per_device_train_batch_size x gradient_accumulation_steps x processes = {product} completions, "
                    f"as TRL counts them, are no whole number of groups of --num_generations {completions}; make it a "
                    "multiple, or give --batch_size, the prompts of a step"
                )
            product //= completions
            by = f" / num_generations {completions}" if completions > 1 else ""
            if batch_size not in (None, product):
                raise UserError(
                    f"--batch_size {batch_size} contradicts per_device_train_batch_size x "
                    f"gradient_accumulation_steps x processes{by} = {product}; give one or the other"
                )
            batch_size = product
        rate = self.learning_rate
        if rate is None:
            rate = DEFAULT_LEARNING_RATE.get(method, OTHER_LEARNING_RATE)
        return dataclasses.replace(
            self,
            batch_size=batch_size or DEFAULT_BATCH_SIZE,
            per_device_train_batch_size=None,
            gradient_accumulation_steps=None,
            learning_rate=rate,
        )
