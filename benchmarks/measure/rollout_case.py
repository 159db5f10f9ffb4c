"""What the suite `rollout` measures: prompts, completions and their lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

LENGTHS = (125, 92, 93, 83)
"""Tokens of the prompts, in turn: of the first rows of GSM8K in SmolLM2's tokens."""


@dataclass(frozen=True)
class RolloutCase:
    """Prompts x completions of up to `tokens` tokens."""

    model: str
    prompts: int = 4
    group: int = 8
    tokens: int = 64
    ends: bool = False
    dtype: str = "float32"
    adapter: str = "lora"

    @property
    def case(self) -> str:
        how = "ends" if self.ends else "limit"
        return f"rollout-{self.adapter}-{self.model}-{self.prompts}x{self.group}x{self.tokens}-{how}"

    def fields(self) -> dict[str, Any]:
        shape = {"prompts": self.prompts, "group": self.group, "tokens": self.tokens, "ends": self.ends}
        return {"model": self.model, "adapter": self.adapter, "dtype": self.dtype, **shape}

    def texts(self) -> list[str]:
        """A byte is a token of the tokenizer."""
        draw = random.Random(0)
        letters = "abcdefghijklmnopqrstuvwxyz "
        return ["".join(draw.choices(letters, k=LENGTHS[i % len(LENGTHS)])) for i in range(self.prompts)]


def cases(gpu: bool) -> list[RolloutCase]:
    """With lengths that end and with lengths that do not."""
    shape: dict[str, Any] = {"model": "SmolLM2-135M"}
    if gpu:
        shape = {"model": "Qwen2.5-0.5B", "prompts": 8, "tokens": 128, "dtype": "bfloat16"}
    return [RolloutCase(**shape, ends=ends) for ends in (False, True)]
