"""AdamW over what a run trains: which tensors, in which groups, by which implementation; and its learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from .config import TrainConfig
from .config.numbers import number_of
from .errors import UserError, first_line


def adamw(
    parameters: Iterable[Any],
    learning_rate: float,
    weight_decay: float = 0.0,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """torch's AdamW for all tensors at once, TRL's default `adamw_torch_fused` as well. By itself torch would take one
    after the other on a CPU, and on a GPU make a copy of every second moment."""
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=betas, eps=eps, fused=True)


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """In the module's order, by which a sharded run knows that it clips the whole model."""
    return [p for p in module.parameters() if p.requires_grad]


def make_optimizer(trained: Sequence[nn.Parameter], config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over what is trainable; weight decay on matrices only, as transformers does."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    assert config.learning_rate is not None
    options: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if config.optim == "adamw_torch":
        return adamw(groups, config.learning_rate, **options)
    if device.type != "cuda":
        raise UserError(f"--optim {config.optim} needs a GPU; use adamw_torch on {device.type}")
    import bitsandbytes as bnb

    name = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit"}
    return getattr(bnb.optim, name[config.optim])(groups, lr=config.learning_rate, **options)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> Any:
    """The learning rate's schedule. A share of warm-up leaves the last step its rate, so that a run of one step trains.
    UserError for options that the schedule does not have, or lacks."""
    warmup = min(number_of(config.warmup_steps, total_steps) or 0, total_steps - 1)
    try:
        return get_scheduler(config.lr_scheduler_type, optimizer, warmup, total_steps, config.schedule_options)
    except (TypeError, ValueError) as error:
        said = first_line(error).replace("get_", "").replace("()", "")
        raise UserError(f"--lr_scheduler_type {config.lr_scheduler_type}: {said}; see --lr_scheduler_kwargs") from error
