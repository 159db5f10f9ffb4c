"""What a launcher has started: which of its settings are refused before anything else, and what to tell about it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import UserError
from .sharding import is_sharded
from .zero import INSTALL, is_zero

# By how `accelerate launch` tells its processes, the setting and what is to be said of it.
UNTRIED = {
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
# Of DeepSpeed's settings what each has to be, where it is there, and what is to be said of another value.
OFFLOAD = "offload_optimizer_device and offload_param_device have not been tried with logratio yet: set them to none"
ZERO = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none", "deepspeed_config_file is not read: leave it out"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": (
        "2",
        "of DeepSpeed only ZeRO-2 is supported: to shard weights too use FSDP2 (configs/accelerate/fsdp2.yaml), else "
        "set zero_stage to 2",
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none", OFFLOAD),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none", OFFLOAD),
    "ACCELERATE_GRADIENT_CLIPPING": ("auto", "gradient_clipping: leave it out and give logratio --max_grad_norm"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "1",
        "gradient_accumulation_steps: set it to 1; --micro_batch_tokens is logratio's way",
    ),
}
ZERO_READY = "(configs/accelerate/zero2.yaml)"
READY = "(configs/accelerate/fsdp2.yaml)"


def refuse_untried(mixed_precision: str = "no", environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError for a way to run several processes in which no run has been compared with one process, and for
    what a launcher asks of the computation and the run does not. mixed_precision: the run's."""

    def says(name: str) -> bool:
        return environment.get(name, "false").lower() in ("true", "1", "yes")

    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", mixed_precision):
        raise UserError(
            f"the launcher asks for mixed_precision {asked}, and the run for {mixed_precision}, which is what would "
            f"count: give the run --mixed_precision {asked}, or set the launcher's to no"
        )
    if (backend := environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        raise UserError(f"the launcher's dynamo_backend {backend} (torch.compile) is not supported: set it to no")
    for name, message in UNTRIED.items():
        if says(name):
            raise UserError(f"{message} {READY}")
    if says("ACCELERATE_USE_DEEPSPEED"):
        refuse_untried_zero(environment)
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


def refuse_untried_zero(environment: Mapping[str, str]) -> None:
    """As `refuse_untried`, for DeepSpeed."""
    for name, (wanted, message) in ZERO.items():
        if environment.get(name, wanted).lower() != wanted:
            raise UserError(f"{message} {ZERO_READY}")
    if find_spec("deepspeed") is None:
        raise UserError(f"DeepSpeed is not installed: {INSTALL}")


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
    for name, happens in {"FSDP": is_sharded(accelerator), "DeepSpeed": is_zero(accelerator)}.items():
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true" and not happens:
            raise UserError(
                f"{name} was asked for, but accelerate shards nothing here ({accelerator.distributed_type.value}): it "
                "needs a GPU for each process and a launcher (accelerate launch); leave it out to train with whole "
                "weights"
            )
    if is_zero(accelerator) and world == 1:
        raise UserError("DeepSpeed has nothing to shard over with one process: leave it out")


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
    if is_zero(accelerator):
        return [f"gradients and optimizer state are sharded over {world} processes (DeepSpeed ZeRO-2)"]
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
