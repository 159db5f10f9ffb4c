"""What a launcher has started: which of its settings are refused before anything else, and what to tell about it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import UserError
from .sharding import is_sharded

# By how `accelerate launch` tells its processes, the setting and what is to be said of it.
UNTRIED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed has not been tried with logratio yet: shard with FSDP2",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported: shard with FSDP2",
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "tensor, context and hybrid parallelism (parallelism_config) are not supported: shard with FSDP2"
    ),
}
UNTRIED_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params has not been tried with logratio yet: set it to false",
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing: set it to false and give logratio --gradient_checkpointing"
    ),
}
READY = "(configs/accelerate/fsdp2.yaml)"


def refuse_untried(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError for a way to run several processes in which no run has been compared with one process."""

    def says(name: str) -> bool:
        return environment.get(name, "false").lower() in ("true", "1", "yes")

    for name, message in UNTRIED.items():
        if says(name):
            raise UserError(f"{message} {READY}")
    if not says("ACCELERATE_USE_FSDP"):
        return
    if environment.get("FSDP_VERSION", "1") != "2":
        raise UserError(f"FSDP 1 is not supported: set fsdp_version to 2 {READY}")
    if environment.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        raise UserError(
            "fsdp_auto_wrap_policy SIZE_BASED_WRAP would shard the LM head apart from the forward pass that reads it: "
            f"use TRANSFORMER_BASED_WRAP {READY}"
        )
    for name, message in UNTRIED_FSDP.items():
        if says(name):
            raise UserError(f"{message} {READY}")


def load_everywhere() -> None:
    """Let every process have the weights before they are sharded: each tries the model that it has loaded, and has to
    find the same. Launchers ask for one loader by default."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def check_processes(accelerator: Accelerator) -> None:
    """Raise UserError where a launcher's processes would not find each other, or would not shard what they should."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != accelerator.num_processes:
        raise UserError(
            f"the launcher started {world} processes but accelerate sees {accelerator.num_processes}: each would train "
            "alone; on CPUs set ACCELERATE_USE_CPU=true and launch with torchrun"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not is_sharded(accelerator):
        raise UserError(
            f"FSDP was asked for, but accelerate shards nothing here ({accelerator.distributed_type.value}): it needs "
            "a GPU for each process and a launcher (accelerate launch); leave it out to train with whole weights"
        )


def check_alike(accelerator: Accelerator, frozen: str) -> None:
    """Raise UserError where a process has loaded other weights than the main one; frozen: their fingerprint."""
    if accelerator.num_processes == 1:
        return
    everyones = gather_object([frozen])
    others = [str(rank) for rank, theirs in enumerate(everyones) if theirs != everyones[0]]
    if others:
        raise UserError(
            f"the model's frozen weights differ between process 0 and {', '.join(others)}: "
            "give all processes the same files"
        )


def describe_processes(accelerator: Accelerator) -> list[str]:
    """What to tell about the processes of the run."""
    world = accelerator.num_processes
    if is_sharded(accelerator):
        return [
            f"weights, gradients and optimizer state are sharded over {world} processes (FSDP2), each of which has "
            "loaded the whole model first"
        ]
    if world > 1:
        return []
    # For several processes the launcher gives the place where they meet; where they do meet, each knows its number.
    asked = "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ
    if accelerator.device.type == "cpu" and asked:
        return [
            "this is one process: on CPUs `accelerate launch` starts no more, whatever --num_processes says; use "
            "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m logratio.trainers.cli train ...`"
        ]
    return []
