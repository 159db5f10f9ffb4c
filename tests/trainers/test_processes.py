"""Two processes train as one does: uneven deals, one that runs out, a pass over the window, a moving reference."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from logratio.trainers import cli

# Trains each configuration in turn, and writes down what every process did.
WORKER = """
import json, os, sys
from pathlib import Path
from accelerate.utils import DistributedType
from logratio.trainers import cli
from logratio.trainers import loop
from logratio.trainers.step import Step

seen, build, cut = [], loop.build, Step.micro_batches

def building(config):
    run = build(config)
    assert run.accelerator.num_processes == 2, run.accelerator.num_processes
    assert run.accelerator.distributed_type == DistributedType.MULTI_CPU, run.accelerator.distributed_type
    return run

def cutting(self, *args, **kwargs):
    micros = cut(self, *args, **kwargs)
    seen.append([len(micros), sum(m.batch.is_filler for m in micros)])
    return micros

loop.build, Step.micro_batches = building, cutting
record = {}
for words in json.loads(sys.argv[1]):
    seen.clear()
    assert cli.main(words) == 0
    record[words[1]] = list(seen)
Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps(record))
"""
METHODS = {"dpo": 7, "kto": 8}
STEPS = 3


# What a launcher tells its processes: those of another launch are none of ours.
TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")
LOOPBACK = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def own_environment(**environment: str) -> dict[str, str]:
    """The environment of a program that knows of no launcher but its own."""
    inherited = {k: v for k, v in os.environ.items() if k not in TOLD and not k.startswith("TORCHELASTIC")}
    return {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}


def launch(arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Two processes that share nothing with other launches: their store takes a free port, and stands, as do their
    connections, on the loopback interface, so that no name is looked up. The time limit is the test's."""
    here = ["--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *here, *arguments]
    env = own_environment(GLOO_SOCKET_IFNAME=LOOPBACK, **environment)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def words_for(method: str, folder: Path, output: str) -> list[str]:
    """Steps of three ragged examples, of which a micro-batch takes one or two; the last DPO step has one example."""
    rows = []
    for i in range(METHODS.get(method, 6)):
        right, wrong = str(i + 1) * (1 + 7 * (i % 3 == 0)), str(i + 30)
        row = {"prompt": f"{i}+1=", "answer": str(i + 1)}
        if method == "dpo":
            row |= {"chosen": right, "rejected": wrong}
        elif method == "kto":
            row |= {"completion": right, "label": i % 2 == 0}
        rows.append(row)
    data = folder / f"{method}.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    words = ["train", method, "--dataset_name", str(data), "--output_dir", str(folder / output / method)]
    words += ["--lora_r", "2", "--batch_size", "3", "--micro_batch_tokens", "20", "--learning_rate", "2e-4"]
    if method == "kto":  # its reference follows the policy
        words += ["--sync_ref_model", "--ref_model_sync_steps", "1"]
    return [*words, "--max_steps", str(STEPS)]


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What two processes leave that compare rollouts, and then train: a launch takes longer than its work."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "both.py").write_text(COMPARING + WORKER)
    runs = [words_for(method, folder, "two") for method in METHODS]
    rollouts = words_for("grpo", folder, "two") + ["--num_generations", "2", "--max_completion_length", "4"]
    rollouts += ["--scale_rewards", "batch", "--eval_size", "1"]  # of which the second process has nothing
    done = launch(["both.py", json.dumps([*runs, rollouts])], folder, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_train_as_one_does(launched):
    tmp_path = launched
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for method in METHODS:
        zero, one = (rank[method] for rank in ranks)
        assert [count for count, _ in zero] == [count for count, _ in one], "or a collective would hang"
        assert any(a[1] != b[1] for a, b in zip(zero, one, strict=True)), "no process ran out, so that was not tested"
    assert ranks[1]["dpo"][2] == [1, 1], "the second process had nothing at all in the last step"
    assert [row["step"] for row in log_of(tmp_path / "two" / "grpo")] == [1, 2, 3]

    for method in METHODS:
        assert cli.main(words_for(method, tmp_path, "one")) == 0
        alone, together = (log_of(tmp_path / name / method) for name in ("one", "two"))
        assert len(alone) == len(together) == STEPS
        for mine, theirs in zip(alone, together, strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine.keys() - {"tokens_per_s", "step_ms", "peak_mem_mib", "hash"}:
                assert theirs[name] == pytest.approx(mine[name], rel=2e-5, abs=1e-6), (mine["step"], name)
        weights = [load_file(tmp_path / name / method / "adapter_model.safetensors") for name in ("one", "two")]
        assert weights[0].keys() == weights[1].keys()
        assert max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]) < 1e-6
        assert max(p.abs().max().item() for name, p in weights[0].items() if "lora_B" in name) > 2e-4


# Compares groups of which the first process holds two and the second one, in every way.
COMPARING = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from logratio.losses.advantages import ADVANTAGES
from logratio.trainers.config import RolloutConfig
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.rollout.rollouts import Rolled, Rollouts

alone = Accelerator()
world, rank = alone.num_processes, alone.process_index
nan = float("nan")
groups = [[[1, 3], [0, 1], [0.5, 0]], [[2, nan], [nan, nan], [7, 0]], [[9, 1], [9, 2], [4, 0]]]
mine = range(rank, 3, world)
by_function = torch.tensor([groups[i] for i in mine]).double()
examples = [Example([1], [Completion([0] * (i + k + 1)) for k in range(3)], row=i) for i in mine]
rolled = Rolled(examples, by_function, torch.tensor([[0.5 * i] for i in mine]).double())
kl = torch.tensor([[0.1 * i - 0.2 * k for k in range(3)] for i in mine]).double()
compared = {"world": world}
kinds = [{"advantage_type": kind} for kind in ADVANTAGES]
kinds += [{"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}]
kinds += [{"advantage_type": "rloo", "normalize_advantages": True, "reward_kl_coef": 0.5}]
for options in kinds:
    config = RolloutConfig(num_generations=3, reward_funcs=("a", "b"), reward_weights=(1.0, 0.5), **options)
    rollouts = Rollouts(None, None, config, {"a": None, "b": None}, 8)
    advantages = rollouts.advantages(rolled, alone, kl if config.reward_kl_coef else None)
    compared[json.dumps(options)] = {i: row for i, row in zip(mine, advantages.tolist(), strict=True)}
mean = rollouts.metrics(rolled, alone)["reward_std"]
compared["reward_std"] = float(mean.total / mean.count)
Path(f"{'one' if world == 1 else 'two'}{rank}.json").write_text(json.dumps(compared))
"""


def test_rollouts_are_compared_with_those_of_all_processes(launched, monkeypatch):
    monkeypatch.chdir(launched)
    exec(COMPARING, {})  # as one process
    one, *two = (json.loads((launched / name).read_text()) for name in ("one0.json", "two0.json", "two1.json"))
    assert one.pop("world") == 1 and [t.pop("world") for t in two] == [2, 2]
    std = one.pop("reward_std")
    assert std > 1 and [t.pop("reward_std") for t in two] == pytest.approx([std, std])
    assert len(one) == 9
    for options, rows in one.items():
        assert two[0][options].keys() == {"0", "2"} and two[1][options].keys() == {"1"}
        for i, row in (two[0][options] | two[1][options]).items():
            assert row == pytest.approx(rows[i], rel=1e-9, abs=1e-12), options
        assert any(abs(x) > 0.1 for row in rows.values() for x in row)


REFUSED = (
    "logratio: the launcher started 2 processes but accelerate sees 1: each would train alone; "
    "on CPUs set ACCELERATE_USE_CPU=true and launch with torchrun"
)


def test_a_process_that_would_train_alone_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(words_for("dpo", tmp_path, "alone")) == 1
    assert REFUSED in capsys.readouterr().err and not (tmp_path / "alone").exists()


@pytest.mark.slow
def test_processes_that_would_train_alone_are_refused(tmp_path):
    """torchrun without ACCELERATE_USE_CPU: accelerate takes each process for the only one."""
    words = ["-m", "logratio.trainers.cli", *words_for("dpo", tmp_path, "alone")]
    done = launch(words, tmp_path, ACCELERATE_USE_CPU="false")
    assert done.returncode != 0
    assert REFUSED in done.stderr and "saved in" not in done.stdout
    assert not (tmp_path / "alone").exists()
