"""Which engine a run has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...config import RolloutConfig
from ...policy.policy import Policy
from .in_process import InProcess
from .protocol import Engine
from .vllm import VLLM

ADAPTERS = ".adapters"
"""Folder in `output_dir` for what servers are given."""


def engine_of(
    config: RolloutConfig,
    policy: Policy,
    tokenizer: Any,
    *,
    tell: Callable[[str, str], None],
    accelerator: Accelerator | None,
    output_dir: str,
) -> Engine:
    """By `rollout_engine`. tell(key, text): what to tell the user, each thing once."""
    if config.rollout_engine == "vllm":
        return VLLM(
            policy,
            config.servers,
            timeout=config.vllm_server_timeout,
            folder=Path(output_dir) / ADAPTERS,
            accelerator=accelerator,
            behind=max(1, config.max_staleness),
        )
    return InProcess(policy, tokenizer, tell=tell, accelerator=accelerator)
