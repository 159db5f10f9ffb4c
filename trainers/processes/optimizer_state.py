"""The optimizer's state as one, by the names of the parameters: written by one number of processes, read by another.

{"state": {name: {"step": ..., "exp_avg": ..., "exp_avg_sq": ...}}, "param_groups": [{"params": [name, ...], ...}]}
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from .sharding import reshard


def optimizer_state(policy: Any, optimizer: Any, accelerator: Accelerator) -> dict[str, Any]:
    """All of it, on the CPU of the main process; {} on the others. Called on every process, after a step."""
    reshard(policy)  # whose parameters are then the optimizer's
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_optimizer_state_dict(policy, bare(optimizer), options=options)
    return state if accelerator.is_main_process else {}


def load_optimizer_state(policy: Any, optimizer: Any, accelerator: Accelerator, state: dict[str, Any]) -> None:
    """Give an optimizer that has not stepped what `optimizer_state` returned. Called on every process.

    state: of which only the main process's is looked at.
    """
    reshard(policy)
    several = accelerator.num_processes > 1
    # A parameter that has had no gradient yet has no state, and needs none.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several, strict=False)
    set_optimizer_state_dict(policy, bare(optimizer), state, options=options)
    for group in bare(optimizer).param_groups:  # a pair of numbers comes back as a list
        group |= {key: tuple(value) for key, value in group.items() if key != "params" and isinstance(value, list)}


def bare(optimizer: Any) -> torch.optim.Optimizer:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
