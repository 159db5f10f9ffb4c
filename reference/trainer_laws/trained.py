"""What a trainer shows of itself, and the rows that it is shown."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Update = Callable[[Tensor, Tensor], Tensor]
"""(weight, gradient) -> the weight behind an optimizer's first step, in float64."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What `fn(rows, ...)` returns.

    losses: one an optimizer step, as the trainer reports them. start, end: every tensor of the model by its name,
    copied before the first step and behind the last. trained: the names that are meant to move; None: all.
    gradient: what the optimizer was given in the first step, by name; AdamW's update hardly depends on its size, so
    without it a factor is seen under SGD alone. update: the optimizer's first step, see `sgd`, `adamw`.
    """

    losses: Sequence[float]
    start: Mapping[str, Tensor]
    end: Mapping[str, Tensor]
    trained: Collection[str] | None = None
    gradient: Mapping[str, Tensor] | None = None
    update: Update | None = None

    @property
    def moving(self) -> list[str]:
        """The names of what is meant to move, in the model's order."""
        return [name for name in self.start if self.trained is None or name in self.trained]


def sgd(learning_rate: float, weight_decay: float = 0.0) -> Update:
    """w - lr (g + wd w), `torch.optim.SGD` without momentum."""
    return lambda w, g: w - learning_rate * (g + weight_decay * w)


def adamw(learning_rate: float, *, eps: float = 1e-8, weight_decay: float = 0.01) -> Update:
    """(1 - lr wd) w - lr g / (|g| + eps), `torch.optim.AdamW` (arXiv 1711.05101), whose betas cancel in its first
    step."""
    return lambda w, g: (1 - learning_rate * weight_decay) * w - learning_rate * g / (g.abs() + eps)


IDS = 10
"""Token ids of the rows are 0 to 9; a trainer that takes text makes a word of each."""
KINDS = ("sequence", "paired", "labeled", "grouped")

DESIGNS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "alike": lambda i, n: (n, n),
    "uneven": lambda i, n: (1, n + 1) if i % 2 == 0 else (n + 1, 1),
    "ragged": lambda i, n: (1 + n * i, 1),
}
"""(number of a row, size) -> (prompt tokens, scored tokens). All lengths alike; as many tokens in all, unevenly many of
them scored; as many scored, behind prompts of other lengths. So a law is broken by what it speaks of alone."""


def make_rows(kind: str, design: str, count: int, size: int, draw: int = 0, block: int = 1) -> list[dict[str, Any]]:
    """Rows of a kind: `prompt` with `completion` (sequence), `chosen`, `rejected` and, for triples, `reference`
    (paired), `completion` and `label` (labeled), `completions` and their `rewards` (grouped), lists of token ids; and
    `row`, its number, by which rows are told apart whose prompts happen to be equal. block: so many neighbours have the
    same lengths."""
    return [_row(kind, i, *DESIGNS[design](i // block, size), random.Random(1000 * draw + i)) for i in range(count)]


def _row(kind: str, i: int, prompt: int, scored: int, numbers: random.Random) -> dict[str, Any]:
    """Completions of one prompt have other first tokens."""
    firsts = numbers.sample(range(IDS), 3)
    asked = [numbers.randrange(IDS) for _ in range(prompt)]
    said = [[first, *(numbers.randrange(IDS) for _ in range(scored - 1))] for first in firsts]
    parts: dict[str, dict[str, Any]] = {
        "sequence": {"completion": said[0]},
        "paired": {"chosen": said[0], "rejected": said[1], "reference": said[2]},
        "labeled": {"completion": said[0], "label": i % 2 == 0},
        "grouped": {"completions": said[:2], "rewards": [1.0, 0.25 * (i % 3)]},
    }
    return {"row": i, "prompt": asked, **parts[kind]}


def show_row(row: Mapping[str, Any]) -> str:
    """prompt=[3 1] chosen=[4 0] ..."""
    return " ".join(f"{name}={_shown(value)}" for name, value in row.items() if name not in ("row", "reference"))


def _shown(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return "[" + " ".join(_shown(x) for x in value) + "]"


def joined(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """All of them as one vector, float64; an absent one is left out."""
    found = [tensors[name].detach().double().flatten().cpu() for name in names if name in tensors]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)
