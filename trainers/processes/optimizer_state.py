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

from .sharding import is_sharded, reshard
from .zero import gathered_state, is_zero, load_gathered_state


def optimizer_state(policy: Any, optimizer: Any, accelerator: Accelerator) -> dict[str, Any]:
    """All of it, on the CPU of the main process; {} on the others. Called on every process, after a step."""
    if is_zero(accelerator):
        return gathered_state(policy, optimizer, keep=accelerator.is_main_process)
    if not is_sharded(accelerator):
        return by_name(policy, bare(optimizer)) if accelerator.is_main_process else {}
    reshard(policy)  # whose parameters are then the optimizer's
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: Any = get_optimizer_state_dict(policy, bare(optimizer), options=options)
    return state if accelerator.is_main_process else {}


def load_optimizer_state(policy: Any, optimizer: Any, accelerator: Accelerator, state: dict[str, Any]) -> None:
    """Give an optimizer that has not stepped what `optimizer_state` returned. Called on every process, each with the
    state; where weights are sharded, only the main process's is looked at."""
    if is_zero(accelerator):
        load_gathered_state(policy, optimizer, state)
        return
    if not is_sharded(accelerator):
        load_by_name(policy, bare(optimizer), state)
        return
    reshard(policy)
    # A parameter that has had no gradient yet has no state, and needs none.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_optimizer_state_dict(policy, bare(optimizer), state, options=options)
    for group in bare(optimizer).param_groups:  # in which torch leaves a list where there was a pair of numbers
        group |= {key: tuple(value) for key, value in group.items() if key != "params" and isinstance(value, list)}


def by_name(policy: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Any optimizer's `state_dict`, with names for the numbers of parameters."""
    names = names_of(policy, optimizer)
    own = optimizer.state_dict()
    state = {
        names[index]: {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in entries.items()}
        for index, entries in own["state"].items()
    }
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in own["param_groups"]]
    return {"state": state, "param_groups": groups}


def load_by_name(policy: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse."""
    index = {name: i for i, name in enumerate(names_of(policy, optimizer))}
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in state["param_groups"]]
    optimizer.load_state_dict({"state": {index[n]: v for n, v in state["state"].items()}, "param_groups": groups})


def names_of(policy: Any, optimizer: torch.optim.Optimizer) -> list[str]:
    """Of the optimizer's parameters, in its order."""
    names = {id(p): name for name, p in policy.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def bare(optimizer: Any) -> torch.optim.Optimizer:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
