"""What a process has sampled, and what rewards say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logratio.losses import Mean

from ...data.examples import Example
from ...data.tokenization import Text
from ..engines.protocol import Sample


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
        """[prompts, G] float64, tokens of each completion, without those of an environment."""
        lengths = [len(s.own_logps) for s in self.samples] or [len(c.ids) for e in self.examples for c in e.completions]
        return torch.tensor(lengths, dtype=torch.float64).reshape(self.by_function.shape[:2])

    def take(self, prompts: Sequence[int]) -> Rolled:
        """Those of some of the prompts, in this order; what the rewards logged is nobody's then."""
        group, at = self.by_function.shape[1], torch.tensor(prompts, dtype=torch.long)
        completions = [i * group + k for i in prompts for k in range(group)]
        return Rolled(
            [self.examples[i] for i in prompts],
            self.by_function[at],
            None if self.baseline is None else self.baseline[at],
            None if self.ended is None else self.ended[at],
            {},
            [self.prompts[i] for i in completions],
            [self.samples[i] for i in completions],
            [self.texts[i] for i in completions],
            {column: [values[i] for i in completions] for column, values in self.extra.items()},
            [self.places[i] for i in prompts],
        )


def joined(parts: Sequence[Rolled]) -> Rolled:
    """Rollouts of one group size one after the other; None in a column that some of them do not have."""
    columns = list(dict.fromkeys(column for part in parts for column in part.extra))
    logged: dict[str, Mean] = {}
    for name, mean in (one for part in parts for one in part.logged.items()):
        logged[name] = logged[name].joined(mean) if name in logged else mean

    def every(name: str) -> list[Any]:
        return [one for part in parts for one in getattr(part, name)]

    def stacked(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return Rolled(
        every("examples"),
        torch.cat([part.by_function for part in parts]),
        stacked("baseline"),
        stacked("ended"),
        logged,
        every("prompts"),
        every("samples"),
        every("texts"),
        {c: [v for part in parts for v in part.extra.get(c, [None] * len(part.texts))] for c in columns},
        every("places"),
    )


class Share(NamedTuple):
    """What a process has of a set of rollouts. counts: how many of its prompts are of each step. metrics: of all that
    was sampled for the set."""

    rolled: Rolled
    counts: list[int]
    metrics: dict[str, Mean]


class Scored(NamedTuple):
    """rewards: [completions, functions] float64, NaN where a reward function returned None. texts: of the completions.
    logged, extra: what the rewards logged, as metrics and as columns."""

    rewards: Tensor
    texts: list[str]
    logged: dict[str, Mean]
    extra: dict[str, list[str | None]]
