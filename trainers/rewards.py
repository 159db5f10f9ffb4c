"""Rewards for GRPO, in TRL's signature, and how a reward is named on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Reward = Callable[..., list[float | None]]
"""`reward(prompts=..., completions=..., completion_ids=..., **columns)`: one number a completion, None to abstain."""

REWARDS: dict[str, Reward] = {}


def load_reward(name: str) -> Reward:
    """The reward called `name`: one of `REWARDS`, or `module:function`."""
    raise NotImplementedError


def exact_answer(prompts: list[Any], completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """1 where the completion's final answer is the column `answer`, else 0."""
    raise NotImplementedError
