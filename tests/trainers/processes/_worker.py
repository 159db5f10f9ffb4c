"""What each process of a launch does: `torchrun _worker.py jobs.json`, or `python _worker.py jobs.json 2`, which forks
them; and the same in one process, for comparison.

A job is {"words": of `logratio train`, "kind": "ddp", "fsdp2" or, where a launch asks for DeepSpeed, "zero2", "do": the
name of a function below}. Each process writes what every job gave to rank<number>.json.
"""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor

from logratio.losses.advantages import ADVANTAGES
from logratio.trainers import cli, loop, setup
from logratio.trainers.config import RolloutConfig
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.errors import UserError
from logratio.trainers.ground.given import giving
from logratio.trainers.memory import Memory
from logratio.trainers.options import parse_train
from logratio.trainers.policy.reference import ModelReference
from logratio.trainers.processes import summing
from logratio.trainers.processes.optimizer_state import load_optimizer_state, optimizer_state
from logratio.trainers.processes.sharding import full_weights, load_full_weights
from logratio.trainers.processes.summing import start_alike
from logratio.trainers.processes.watching import ending_together
from logratio.trainers.rollout.engines.in_process import InProcess
from logratio.trainers.rollout.engines.protocol import Sample
from logratio.trainers.rollout.rollouts import Rolled, Rollouts
from logratio.trainers.step import Step

TYPES = {"ddp": DistributedType.MULTI_CPU, "fsdp2": DistributedType.FSDP, "zero2": DistributedType.DEEPSPEED}


def starter(kind: str) -> Any:
    """`Accelerator`, which on a CPU takes FSDP2 for DDP, and has to be told afterwards; for DeepSpeed, by which means
    processes can meet there."""

    def start(**options: Any) -> Accelerator:
        if kind == "zero2":
            options["kwargs_handlers"][0].backend = "gloo"
        accelerator = Accelerator(**options)
        if accelerator.num_processes > 1:
            if kind == "fsdp2":
                wrap = "TRANSFORMER_BASED_WRAP"
                accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=wrap)
            if kind != "zero2":
                AcceleratorState._shared_state["distributed_type"] = TYPES[kind]
                PartialState._shared_state["distributed_type"] = TYPES[kind]
            assert accelerator.distributed_type == TYPES[kind] and accelerator.is_fsdp2 == (kind == "fsdp2")
        return accelerator

    return start


def longer(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward."""
    return [len(ids) + 0.1 * (sum(ids) % 7) for ids in completion_ids]


def now_and_then(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that tells nothing of every other prompt."""
    return [r * (int(p[0]) % 2) for p, r in zip(prompts, longer(completion_ids), strict=True)]


def hanging(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
    """A reward that hangs on process 1 in the second step."""
    if trainer_state.global_step == 1 and os.environ["RANK"] == "1":
        time.sleep(1000)
    return longer(completion_ids)


def share_held(model: torch.nn.Module) -> float:
    """Of its parameters, how much this process holds."""
    parts = [(p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters()]
    return sum(parts) / sum(p.numel() for p in model.parameters())


@contextmanager
def prepared(kind: str, seen: list[list[int]]) -> Any:
    """Inside, runs start with `kind`, and note [micro-batches, fillers] of each call."""
    cut = Step.micro_batches

    def cutting(self: Step, *args: Any, **kwargs: Any) -> Any:
        micros = cut(self, *args, **kwargs)
        seen.append([len(micros), sum(m.batch.is_filler for m in micros)])
        return micros

    with (
        patch.object(setup, "Accelerator", starter(kind)),
        patch.object(Step, "micro_batches", cutting),
    ):
        yield


def train(words: list[str], kind: str = "ddp") -> dict[str, Any]:
    seen: list[list[int]] = []
    held: dict[str, float] = {}
    dtypes: dict[str, str] = {}

    def building(config: Any) -> Any:
        run = setup.build(config)
        held["policy"] = share_held(run.policy)
        live = getattr(run.step.reference, "live", run.step.reference)
        held["reference"] = share_held(live.policy) if isinstance(live, ModelReference) else 0.0
        # after what is done to it there, if anything
        run.policy.register_forward_hook(lambda m, i, out: dtypes.update(logps=str(getattr(out, "logps", out).dtype)))
        embeddings = run.policy.causal_lm.get_input_embeddings()
        embeddings.register_forward_hook(lambda m, i, out: dtypes.update(embedded=str(out.dtype)))
        return run

    with prepared(kind, seen), patch.object(loop, "build", building):
        row = loop.train(parse_train(words))
    return {"row": row, "cut": seen, "held": held, "dtypes": dtypes}


def built(words: list[str]) -> Any:
    """A run of one process."""
    return setup.build(parse_train(words))


def sample(words: list[str], kind: str = "ddp") -> dict[str, Any]:
    """Training, in which every other process takes longer over its rollouts, in more passes."""
    once = InProcess.say

    def slower(*args: Any, **kwargs: Any) -> list[list[Sample]]:
        for _ in range(PartialState().process_index % 2):
            once(*args, **kwargs)
        return once(*args, **kwargs)

    with patch.object(InProcess, "say", slower):
        return train(words, kind)


def compare(words: list[str], kind: str = "ddp") -> dict[str, Any]:
    """Groups of rollouts of which the first process holds two and the second one, compared in every way."""
    alone = Accelerator()
    world, rank = alone.num_processes, alone.process_index
    nan = float("nan")
    groups = [[[1, 3], [0, 1], [0.5, 0]], [[2, nan], [nan, nan], [7, 0]], [[9, 1], [9, 2], [4, 0]]]
    mine = range(rank, 3, world)
    by_function = torch.tensor([groups[i] for i in mine]).double()
    examples = [Example([1], [Completion([0] * (i + k + 1)) for k in range(3)], row=i) for i in mine]
    rolled = Rolled(examples, by_function, torch.tensor([[0.5 * i] for i in mine]).double())
    kl = torch.tensor([[0.1 * i - 0.2 * k for k in range(3)] for i in mine]).double()
    kinds: list[dict[str, Any]] = [{"advantage_type": kind} for kind in ADVANTAGES]
    kinds += [{"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}]
    kinds += [{"advantage_type": "rloo", "normalize_advantages": True, "reward_kl_coef": 0.5}]
    compared: dict[str, Any] = {}
    for options in kinds:
        config = RolloutConfig(num_generations=3, reward_funcs=("a", "b"), reward_weights=(1.0, 0.5), **options)
        compares = Rollouts(None, None, config, {"a": None, "b": None}, 8)  # type: ignore[arg-type, dict-item]
        advantages = compares.advantages(rolled, alone, kl if config.reward_kl_coef else None)
        compared[json.dumps(options)] = {str(i): row for i, row in zip(mine, advantages.tolist(), strict=True)}
    mean = compares.metrics(rolled, alone)["reward_std"]
    return {"advantages": compared, "reward_std": float(mean.total / mean.count)}


def sums(words: list[str], kind: str = "ddp") -> dict[str, Any]:
    """Gradients of two processes, some of which one or both have not, added up in buckets of four values."""
    accelerator = Accelerator()
    rank = accelerator.process_index
    shapes = {"both": (2, 3), "second": (1,), "none": (2,), "narrow": (2,), "after": (3,)}
    dtypes = {"narrow": torch.bfloat16}
    trained = {n: nn.Parameter(torch.full(s, rank + 1.0, dtype=dtypes.get(n))) for n, s in shapes.items()}
    start_alike(list(trained.values()), accelerator)
    begun = {name: p.detach().flatten().tolist() for name, p in trained.items()}
    memory = Memory(accelerator, list(trained.values()), None, 100)

    def passes() -> None:
        for name, p in trained.items():
            if name != "none" and (name != "second" or rank == 1):
                p.grad = torch.arange(p.numel()).view_as(p).to(p.dtype) + 10 * rank

    with patch.object(summing, "BUCKET_NUMEL", 4):
        memory.together(passes, backward=True)
        cut = [[p.numel() for p in bucket] for bucket in summing.buckets(list(trained.values()))]
    summed = {name: None if p.grad is None else p.grad.flatten().tolist() for name, p in trained.items()}
    return {"begun": begun, "summed": summed, "buckets": cut}


def round_trip(words: list[str], kind: str = "ddp") -> dict[str, Any]:
    """The weights and the optimizer's state of a run, put into a second run that has not begun."""
    seen: list[list[int]] = []
    with prepared(kind, seen):
        run = setup.build(parse_train(words))
        loop.train_run(run)
        state = optimizer_state(run.policy, run.optimizer, run.accelerator)
        words = [w + "-again" if Path(w).name == "out" else w for w in words]
        weights = full_weights(run.policy, run.accelerator)
        other = setup.build(parse_train(words))
        load_full_weights(other.policy, other.accelerator, weights or {})
        reloaded = full_weights(other.policy, other.accelerator)
        load_optimizer_state(other.policy, other.optimizer, other.accelerator, state)
        again = optimizer_state(other.policy, other.optimizer, other.accelerator)
    if run.accelerator.is_main_process:
        torch.save(state, "optimizer.pt")
        torch.save(again, "optimizer-again.pt")
    same = [torch.equal(weights[name], reloaded[name]) for name in weights]
    return {"names": len(state.get("state", {})), "weights": len(weights), "reloaded": sum(same)}


def spoil(words: list[str], kind: str = "ddp") -> dict[str, Any]:
    """A run whose gradient on process 1 is not finite in the second step: what it says, and by how much it still moved
    its weights."""
    before: list[torch.Tensor] = []

    def spoiled(gradient: torch.Tensor) -> torch.Tensor:
        if run.scheduler.last_epoch == 0:
            return gradient
        before[:] = [p.detach().clone() for p in run.trained]
        return gradient * (float("nan") if run.accelerator.process_index == 1 else 1.0)

    with prepared(kind, []), ending_together():  # or the watch would be alive when the process ends, and abort it
        run = setup.build(parse_train(words))
        run.trained[0].register_hook(spoiled)
        try:
            loop.train_run(run)
            said = ""
        except UserError as error:
            said = str(error)
    moved = max(float((a - p.detach()).abs().max()) for a, p in zip(before, run.trained, strict=True))
    return {"said": said, "moved": moved}


def differ(words: list[str], kind: str = "ddp") -> dict[str, str]:
    """What is said where process 1 was given something else than process 0."""
    rank = int(os.environ["RANK"])
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "0"} for i in range(8)]
    halves = {"object:rows": {"train": rows[rank::2]}}
    asked = {
        "options": [*words, "--learning_rate", f"{rank + 1}e-4"],
        "begun": [*words, *(["--resume_from_checkpoint", "latest"] if rank else [])],
        "rows": [*words, "--dataset_name", "object:rows"],
    }
    said = {}
    for name, own in asked.items():
        try:
            with giving(halves):
                setup.build(parse_train(own))
        except UserError as error:
            said[name] = str(error)
    return said


def end(words: list[str], kind: str = "ddp") -> dict[str, Any]:
    """A run that process 1 alone ends after its second step, and that each process would write elsewhere."""
    rank = int(os.environ["RANK"])
    run = setup.build(parse_train([*words, "--output_dir", f"{words[words.index('--output_dir') + 1]}-{rank}"]))
    row = loop.train_run(run, until=lambda run, row: rank == 1 and row["step"] == 2)
    return {"row": row, "output_dir": run.config.train.output_dir}


def fail(words: list[str], kind: str = "ddp") -> None:
    """A run whose process 1 fails in its second step, in the way that the first word says; the last job of all."""
    step, calls = Step.__call__, []

    def failing(self: Step, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 and self.accelerator.process_index == 1:
            if words[0] == "raise":
                raise ZeroDivisionError("of all things")
            if words[0] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return step(self, *args, **kwargs)

    with patch.object(Step, "__call__", failing):
        sys.exit(cli.main(["train", *words[1:]]))


def command(words: list[str], kind: str = "ddp") -> None:
    """`logratio train` to its end; the last job of all."""
    sys.exit(cli.main(["train", *words]))


def main() -> None:
    record = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if PartialState._shared_state and job.get("kind") != "zero2":  # a job before may have said otherwise
            PartialState._shared_state["distributed_type"] = TYPES["ddp"]
        record.append(globals()[job.get("do", "train")](job["words"], job.get("kind", "ddp")))
        Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps(record))
    assert torch.distributed.get_world_size() == int(os.environ["WORLD_SIZE"]) > 1


def fork(world: int) -> None:
    """`main` in so many processes."""
    meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1"}
    config = LaunchConfig(1, 1, world, run_id="forked", start_method="fork", max_restarts=0, **meeting)
    elastic_launch(config, main)()


if __name__ == "__main__":
    fork(int(sys.argv[2])) if len(sys.argv) > 2 else main()
