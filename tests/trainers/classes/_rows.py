"""What the tests of TRL's classes train on, and how, and what is left of it."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from logratio.benchmarks.peers import randoms

PLAIN = {"gradient_checkpointing": False, "save_strategy": "no", "max_steps": 3, "batch_size": 4, "learning_rate": 1e-3}


def rows(method="dpo", n=12):
    return randoms.random_rows(method, 7, n)


def trained(folder):
    (path,) = [
        p for p in (Path(folder) / "adapter_model.safetensors", Path(folder) / "model.safetensors") if p.exists()
    ]
    return load_file(path)


def assert_same(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
