"""What the step benchmarks train on: random token ids in lengths that are drawn, or given.

Time and memory do not depend on which tokens these are. Lengths of `ultrafeedback` are those that are published of
UltraFeedback (prompts of about 200 tokens, answers of about 300, both log-normal, cut at 1,024); those of `gsm8k` were
counted on 522 preference rows made of GSM8K, in tokens of SmolLM2.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from logratio.losses import Kind, Loss
from logratio.trainers.data.examples import Completion, Example

from ...memory.roofline import completions_of


@dataclass(frozen=True)
class Lengths:
    """Of prompt and completion in tokens: mean and coefficient of variation of a log-normal; 0: all alike.

    correlation: of the logarithms of a prompt's length and of its completions'. max_length: of both together.
    """

    prompt: float
    completion: float
    prompt_cv: float = 0.0
    completion_cv: float = 0.0
    correlation: float = 0.0
    max_length: int = 1024

    def draw(self, rng: random.Random, completions: int) -> tuple[int, list[int]]:
        """The length of a prompt, and of so many completions."""
        common = rng.gauss(0, 1)
        prompt = _log_normal(self.prompt, self.prompt_cv, common)
        prompt = min(max(prompt, 2), self.max_length - 1)
        own = math.sqrt(1 - self.correlation**2)
        drawn = [
            _log_normal(self.completion, self.completion_cv, self.correlation * common + own * rng.gauss(0, 1))
            for _ in range(completions)
        ]
        return prompt, [min(max(n, 1), self.max_length - prompt) for n in drawn]


def _log_normal(mean: float, cv: float, normal: float) -> int:
    sigma = math.sqrt(math.log1p(cv**2))
    return round(mean * math.exp(sigma * normal - sigma**2 / 2))


WORKLOADS = {
    "ultrafeedback": Lengths(200, 300, 0.9, 0.7),
    "gsm8k": Lengths(92, 137, 0.225, 0.42, 0.46),
    "fixed": Lengths(256, 256),
    "rollouts": Lengths(512, 256),
}
"""name -> lengths; `rollouts` is the fixed one of GRPO."""


def examples(loss: Loss, lengths: Lengths, count: int, *, vocab_size: int, seed: int, group: int = 8) -> list[Example]:
    """`count` examples of the loss's kind. group: completions of a prompt, where the loss learns from rollouts."""
    rng = random.Random(seed)
    completions = completions_of(loss, group)

    def ids(n: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(n)]

    out = []
    for row in range(count):
        prompt, answers = lengths.draw(rng, completions)
        extra: dict[str, Any] = {}
        if loss.kind is Kind.LABELED:
            extra["label"] = row % 2 == 0
        if loss.kind is Kind.LISTED:
            extra["rewards"] = tuple(rng.gauss(0, 1) for _ in answers)
        if loss.kind is Kind.GROUPED:
            extra["advantages"] = tuple(rng.gauss(0, 1) for _ in answers)
        out.append(Example(ids(prompt), [Completion(ids(n)) for n in answers], row=row, **extra))
    return out


def count_padded(lengths: list[int], per_batch: int) -> int:
    """Tokens that sequences take up which are padded to the longest of each `per_batch` in turn."""
    batches = [lengths[i : i + per_batch] for i in range(0, len(lengths), per_batch)]
    return sum(max(batch) * len(batch) for batch in batches)
