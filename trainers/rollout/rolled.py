"""What a process has sampled, and what rewards say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from logratio.losses import Mean

from ..data.examples import Example
from ..data.tokenization import Text
from .engines.protocol import Sample


@dataclass(frozen=True)
class Rolled:
    """A process's rollouts, before they are compared.

    examples: one a prompt, with `num_generations` completions and no advantages yet.
    by_function: [prompts, G, K] float64 rewards, NaN where a reward function returned None.
    baseline: [prompts, 1] float64 reward of a greedy completion, where the advantages want it.
    ended: [prompts, G], False where the length limit cut a completion; None: all ended.
    logged: the metrics that the rewards logged themselves.
    prompts, samples, texts, extra: of each completion, as the engine said it and the rewards saw it, and the columns
        that these gave to log_extra.
    places: of each prompt, where it stands among those of all processes.
    """

    examples: list[Example]
    by_function: Tensor
    baseline: Tensor | None = None
    ended: Tensor | None = None
    logged: dict[str, Mean] = field(default_factory=dict)
    prompts: Sequence[Text] = ()
    samples: Sequence[Sample] = ()
    texts: Sequence[str] = ()
    extra: dict[str, list[str | None]] = field(default_factory=dict)
    places: Sequence[int] = ()

    @property
    def lengths(self) -> Tensor:
        """[prompts, G] float64, tokens of each completion."""
        lengths = [len(c.ids) for e in self.examples for c in e.completions]
        return torch.tensor(lengths, dtype=torch.float64).reshape(self.by_function.shape[:2])


class Scored(NamedTuple):
    """rewards: [completions, functions] float64, NaN where a reward function returned None. texts: of the completions.
    logged, extra: what the rewards logged, as metrics and as columns."""

    rewards: Tensor
    texts: list[str]
    logged: dict[str, Mean]
    extra: dict[str, list[str | None]]
