"""How it is trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from logratio.losses.options import Count, NotNegative, Positive

from ..errors import UserError
from .numbers import NotNegativeCount, Seed, check_numbers

# TRL's defaults; every method but SFT starts from a model that can already speak.
DEFAULT_LEARNING_RATE = {"sft": 2e-5}
OTHER_LEARNING_RATE = 1e-6
DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How it is trained."""

    output_dir: str = "runs/latest"
    """Folder for the log, the configuration and the trained model."""
    overwrite_output_dir: bool = False
    """Remove the model and checkpoints that another run left in output_dir; logs and reference log-probs stay."""
    batch_size: Count | None = None
    """Examples of an optimizer step over all processes (default 8): rows for SFT and KTO, pairs for DPO and ORPO,
    prompts for GRPO."""
    per_device_train_batch_size: Count | None = None
    """TRL's spelling: batch_size = this x gradient_accumulation_steps x processes."""
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
    """Peak learning rate (default: 2e-5 for SFT, 1e-6 for the others)."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up."""
    warmup_steps: NotNegativeCount = 0
    """Steps in which the learning rate grows from 0."""
    max_grad_norm: NotNegative = 1.0
    """Clip the gradient's norm to this; 0 does not clip."""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay, of matrices only."""
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw_torch"
    """Optimizer; all but the first are bitsandbytes'."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward pass."""
    eval_steps: Count | None = None
    """Evaluate every so many steps (default: at the end only)."""
    ddp_timeout: Count = 1800
    """Seconds that processes wait for one that does not come, before all end. One that fails ends all at once."""
    seed: Seed = 42
    """Of shuffling, adapters, dropout and rollouts."""

    def __post_init__(self) -> None:
        check_numbers(self)

    @property
    def first_micro_batch_tokens(self) -> int:
        """What a run begins with."""
        return 8192 if self.micro_batch_tokens == "auto" else self.micro_batch_tokens

    def resolved(self, method: str, num_processes: int) -> TrainConfig:
        """With every default that depends on the method or the number of processes filled in, and TRL's spelling of
        batch_size multiplied out."""
        per_device, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        batch_size = self.batch_size
        if per_device is not None or accumulation is not None:
            product = (per_device or DEFAULT_BATCH_SIZE) * (accumulation or 1) * num_processes
            if batch_size not in (None, product):
                raise UserError(
                    f"--batch_size {batch_size} contradicts per_device_train_batch_size x "
                    f"gradient_accumulation_steps x processes = {product}; give one or the other"
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
