"""What a launcher may ask for, and what is said of what it has started."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from logratio.trainers import cli
from logratio.trainers.errors import UserError
from logratio.trainers.processes import launching
from logratio.trainers.processes.launching import (
    check_alike,
    check_processes,
    describe_processes,
    load_everywhere,
    refuse_untried,
)

from ._jobs import words_for
from ._launch import launch

CONFIGS = Path(__file__).parents[3] / "configs" / "accelerate"
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def accelerator(world=1, kind=DistributedType.NO, device="cpu"):
    return SimpleNamespace(num_processes=world, distributed_type=kind, device=torch.device(device))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "tensor, context and hybrid parallelism"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1 is not supported: set fsdp_version to 2"),
        (FSDP2 | {"FSDP_AUTO_WRAP_POLICY": "size_based_wrap"}, "fsdp_auto_wrap_policy SIZE_BASED_WRAP would shard"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "True"}, "fsdp_offload_params has not been tried"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing: set it to false and"),
    ],
)
def test_what_has_not_been_tried_is_refused(environment, said):
    with pytest.raises(UserError, match=f"^{said}.*configs/accelerate/fsdp2.yaml"):
        refuse_untried(environment=environment)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file is not read: leave it out"),
        ({"DEEPSPEED_ZERO_STAGE": "3"}, "of DeepSpeed only ZeRO-2 is supported: to shard weights too use FSDP2"),
        ({"DEEPSPEED_ZERO_STAGE": "1"}, "of DeepSpeed only ZeRO-2 is supported"),
        ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device and offload_param_device have not"),
        ({"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_optimizer_device and offload_param_device have not"),
        ({"GRADIENT_CLIPPING": "1.0"}, "gradient_clipping: leave it out and give logratio --max_grad_norm"),
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps: set it to 1; --micro_batch_tokens is"),
    ],
)
def test_what_has_not_been_tried_of_deepspeed_is_refused(environment, said):
    environment = {f"ACCELERATE_{name}": value for name, value in environment.items()}
    refuse_untried(environment=environment)
    with pytest.raises(UserError, match=f"^{said}.*configs/accelerate/zero2.yaml"):
        refuse_untried(environment={"ACCELERATE_USE_DEEPSPEED": "true"} | environment)


def test_what_a_launcher_asks_of_the_computation_is_not_passed_over():
    """`accelerate launch --mixed_precision bf16`, or a configuration that `accelerate config` has left."""
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    refuse_untried("bf16", bf16)
    refuse_untried("bf16", {"ACCELERATE_MIXED_PRECISION": "no"})
    with pytest.raises(UserError, match=r"^the launcher asks for mixed_precision bf16, and the run for no, .*: give"):
        refuse_untried("no", bf16)
    with pytest.raises(UserError, match=r"^the launcher's dynamo_backend inductor \(torch.compile\) is not supported"):
        refuse_untried("no", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})


def test_deepspeed_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^DeepSpeed is not installed: pip install 'deepspeed>=0.19.8'$"):
        refuse_untried(environment={"ACCELERATE_USE_DEEPSPEED": "true"})
    monkeypatch.setattr(launching, "find_spec", lambda name: name == "deepspeed")
    refuse_untried(environment={"ACCELERATE_USE_DEEPSPEED": "true"})


def test_fsdp2_and_plain_processes_are_not_refused():
    refuse_untried(environment=FSDP2)
    refuse_untried(
        environment={"FSDP_VERSION": "1", "FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_USE_DEEPSPEED": "false"}
    )


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharding_that_does_not_happen_is_refused(name, monkeypatch):
    """On CPUs accelerate takes FSDP and DeepSpeed for DDP."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=rf"^{name} was asked for, but accelerate shards nothing here \(MULTI_CPU\)"):
        check_processes(accelerator(2, DistributedType.MULTI_CPU))
    check_processes(accelerator(2, DistributedType[name.upper()]))


def test_deepspeed_alone_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="^DeepSpeed has nothing to shard over with one process: leave it out$"):
        check_processes(accelerator(1, DistributedType.DEEPSPEED))


def test_every_process_loads_what_is_sharded_afterwards(monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    load_everywhere()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    load_everywhere()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_what_is_told_of_the_processes(monkeypatch):
    for name in ("MASTER_ADDR", "RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert describe_processes(accelerator()) == describe_processes(accelerator(2, DistributedType.MULTI_CPU)) == []
    (note,) = describe_processes(accelerator(2, DistributedType.FSDP))
    assert note.startswith("weights, gradients and optimizer state are sharded over 2 processes (FSDP2)")
    (note,) = describe_processes(accelerator(2, DistributedType.DEEPSPEED))
    assert note == "gradients and optimizer state are sharded over 2 processes (DeepSpeed ZeRO-2)"
    # what `accelerate launch --cpu --num_processes 2` sets
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert describe_processes(accelerator()) == []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    (note,) = describe_processes(accelerator())
    assert note.startswith("this is one process: on CPUs `accelerate launch` starts no more")
    monkeypatch.setenv("RANK", "0")
    assert describe_processes(accelerator()) == []


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_the_ready_configurations_ask_for_nothing_that_is_refused(name, monkeypatch):
    """As accelerate's own launcher reads them."""
    for variable in [v for v in os.environ if v.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launching, "find_spec", lambda name: name == "deepspeed")
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "train.py"])
    args, *_ = _validate_launch_command(args)
    assert args.num_processes == 2 and args.multi_gpu == (name == "ddp") and args.use_deepspeed == (name == "zero2")
    args.deepspeed_fields_from_accelerate_config = ""
    environment = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    for kind, variable in {"fsdp2": "ACCELERATE_USE_FSDP", "zero2": "ACCELERATE_USE_DEEPSPEED"}.items():
        assert environment.get(variable, "false") == str(name == kind).lower()
    assert environment.get("FSDP_VERSION", "2") == "2" and environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") == "2"
    refuse_untried(environment=environment)
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"ddp", "fsdp2", "zero2"}


def test_processes_with_other_weights_are_named(monkeypatch):
    found = ["aa", "bb", "aa", "cc"]
    monkeypatch.setattr(launching, "gather_object", lambda own: found)
    with pytest.raises(UserError, match=r"^the model's frozen weights differ between process 0 and 1, 3: give all"):
        check_alike(accelerator(4), "aa")
    found[:] = ["aa"] * 4
    check_alike(accelerator(4), "aa")
    check_alike(accelerator(1), "aa")


REFUSED = (
    "logratio: the launcher started 2 processes but accelerate sees 1: each would train alone; "
    "on CPUs set ACCELERATE_USE_CPU=true and launch with torchrun"
)


def test_a_process_that_would_train_alone_is_refused(folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", *words_for("dpo", "lora", folder, folder / "alone")]) == 1
    assert REFUSED in capsys.readouterr().err and not (folder / "alone").exists()


@pytest.mark.slow
def test_processes_that_would_train_alone_are_refused(folder):
    """torchrun without ACCELERATE_USE_CPU: accelerate takes each process for the only one."""
    words = ["-m", "logratio.trainers.cli", "train", *words_for("dpo", "lora", folder, folder / "alone")]
    done = launch(2, words, folder, ACCELERATE_USE_CPU="false")
    assert done.returncode != 0
    assert REFUSED in done.stderr and "saved in" not in done.stdout
    assert not (folder / "alone").exists()
