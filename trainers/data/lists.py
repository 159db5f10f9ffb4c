"""Rows with a list of completions and one of rewards: taken apart into a column for each completion, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError, shown
from ..ground.finite import is_finite
from .chat.conversations import is_written_out
from .tokenization import is_conversation

COMPLETIONS, REWARDS = "completions", "rewards"


def taken_apart(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...], tuple[float, ...]]:
    """The row with its completions in columns `completions[0]`, ..., these columns' names, and the rewards.

    Raises UserError unless there are two completions at least, and a finite reward for each.
    """
    values = row[COMPLETIONS]
    if not isinstance(values, list) or is_conversation(values) or is_written_out(values):
        raise UserError(
            f"{where}: {COMPLETIONS!r} must be a list of texts or of conversations, which are lists of messages "
            f"themselves, got {shown(values)}"
        )
    if len(values) < 2:
        raise UserError(
            f"{where}: {COMPLETIONS!r} has fewer than two, and nothing can be compared: add completions of the same "
            "prompt or remove the row"
        )
    rewards = row[REWARDS]
    if not isinstance(rewards, list):
        raise UserError(
            f"{where}: {REWARDS!r} must be a list of numbers, one for each completion, got {shown(rewards)}"
        )
    if len(rewards) != len(values):
        raise UserError(
            f"{where} has {len(values)} completions and {len(rewards)} rewards: give one reward for each completion"
        )
    for i, reward in enumerate(rewards):
        if not is_finite(reward):
            raise UserError(f"{where}: '{REWARDS}[{i}]' must be a finite number, got {shown(reward)}")
    names = tuple(f"{COMPLETIONS}[{i}]" for i in range(len(values)))
    return {**row, **dict(zip(names, values, strict=True))}, names, tuple(map(float, rewards))
