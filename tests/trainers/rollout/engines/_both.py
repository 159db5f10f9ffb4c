"""The same completions by both ways: kernel by kernel, and as one launch a token."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from logratio.trainers.layers.lora_layers import fuse_lora
from logratio.trainers.policy.policy import Policy
from logratio.trainers.rollout.engines.in_process import InProcess
from logratio.trainers.rollout.engines.protocol import Request

PROMPTS = [[5, 9, 11], [7], [3, 3, 8, 12, 40, 41, 42, 43], [20, 21], [30] * 13]
SEEDS = [[1, 2, 3], [None, 4], [5], [6, None, 7, 8], [9, 10]]
REQUESTS = [Request(ids, seeds) for ids, seeds in zip(PROMPTS, SEEDS, strict=True)]
ENDS = frozenset(range(0, 97, 8))


def plainly(policy: Policy, tokenizer: Any, sampling: Any, requests: Any = REQUESTS, rows: int = 5) -> Any:
    """What is said without graphs and their buffers."""
    engine = InProcess(policy, tokenizer, rows=rows)
    engine.uncaptured = "not here"
    return engine.sample(requests, sampling)


def engine_of(policy: Policy, tokenizer: Any, rows: int = 5) -> Any:
    """One that may capture, and what it tells."""
    told: dict[str, str] = {}
    engine = InProcess(policy, tokenizer, rows=rows, tell=told.setdefault)
    return engine, told


def with_lora(model: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    fuse_lora(model)
    return model


def close(one: Any, other: Any, tolerance: float) -> None:
    for mine, his in zip(one, other, strict=True):
        for a, b in zip(mine, his, strict=True):
            assert (a.ids, a.finish_reason) == (b.ids, b.finish_reason)
            assert a.logps == pytest.approx(b.logps, abs=tolerance)
            assert (a.support is None) == (b.support is None)
            assert a.support is None or a.support.ids.tolist() == b.support.ids.tolist()
