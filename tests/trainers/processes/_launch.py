"""Launches of several processes that share nothing with others, and what they are compared with."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
# What a launcher tells its processes: those of another launch are none of ours.
TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")
LOOPBACK = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def own_environment(**environment: str) -> dict[str, str]:
    """The environment of a program that knows of no launcher but its own."""
    inherited = {k: v for k, v in os.environ.items() if k not in TOLD and not k.startswith("TORCHELASTIC")}
    return {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}


def launch(world: int, arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Processes that share nothing with other launches: their store takes a free port, and stands, as do their
    connections, on the loopback interface, so that no name is looked up. The time limit is the test's."""
    here = ["--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", str(world)]
    command = [sys.executable, "-m", "torch.distributed.run", *here, *arguments]
    env = own_environment(GLOO_SOCKET_IFNAME=LOOPBACK, **{"ACCELERATE_USE_CPU": "true", **environment})
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def work(world: int, jobs: list[dict[str, Any]], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Let so many processes do the jobs of `_worker.py` in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return launch(world, [str(HERE / "_worker.py"), "jobs.json"], folder, **environment)


def work_of_one_import(world: int, jobs: list[dict[str, Any]], folder: Path) -> subprocess.CompletedProcess:
    """`work` of processes that torch's launcher forks from one that has imported all: they begin in a third of the
    time. The slow tests have torchrun's own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(HERE / "_worker.py"), "jobs.json", str(world)]
    env = own_environment(GLOO_SOCKET_IFNAME=LOOPBACK, ACCELERATE_USE_CPU="true")
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def said_by(done: subprocess.CompletedProcess, world: int, folder: Path) -> list[list[dict[str, Any]]]:
    """What each process says of each job that it has done."""
    ranks = [folder / f"rank{rank}.json" for rank in range(world)]
    assert all(path.exists() for path in ranks), done.stderr
    return [json.loads(path.read_text()) for path in ranks]


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (p for p in (folder / "adapter_model.safetensors", folder / "model.safetensors") if p.exists())
    return load_file(path)


def differences(one: Path, other: Path) -> torch.Tensor:
    """Of all weights saved in two folders, which have the same names and shapes."""
    a, b = weights_of(one), weights_of(other)
    assert {name: w.shape for name, w in a.items()} == {name: w.shape for name, w in b.items()}
    return torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
