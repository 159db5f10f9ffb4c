"""What an optimizer step is given and what it gives: micro-batches, the window that they are cut from, a result."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from logratio.losses import Largest, Mean

from .batches.packing import PackedBatch
from .data.examples import Example


@dataclass
class MicroBatch:
    """A packed batch and what was computed of it without gradient, [paths, T] each; ref: as a `Reference` gives it;
    logps: the policy's, in the last step on it, where `behavior` is to be compared with them; own: see `Totals.own`.

    budget: the `micro_batch_tokens` that it was packed by, where it may be packed again.
    """

    batch: PackedBatch
    ref: Tensor | None = None
    old: Tensor | None = None
    behavior: Tensor | None = None
    logps: Tensor | None = None
    own: Tensor | None = None
    budget: int | None = None


Position = Mapping[str, int]
"""Where the data go on, see `setup.batches`."""


@dataclass
class Window:
    """What one optimizer step learns from.

    examples: all of the step's, or with `dealt` only this process's own (rollouts that it sampled, in whole groups).
    micros: this process's micro-batches of them. metrics: what is known of the examples before the step.
    taken: how many steps were taken since it was made, on it or on others that were sampled with it.
    position: behind it and these.
    """

    examples: Sequence[Example]
    micros: list[MicroBatch]
    metrics: dict[str, Mean] = field(default_factory=dict)
    dealt: bool = False
    taken: int = 0
    position: Position | None = None


@dataclass
class StepResult:
    """loss: the step's loss. metrics: sums and counts over the step. Both over all processes after `reduced`."""

    loss: Tensor
    metrics: dict[str, Mean] = field(default_factory=dict)

    def add(self, loss: Tensor, metrics: dict[str, Mean]) -> None:
        self.loss = self.loss + loss.detach()
        for name, metric in metrics.items():
            so_far = self.metrics.get(name)
            self.metrics[name] = metric if so_far is None else so_far.joined(metric)

    def reduced(self, accelerator: Accelerator) -> dict[str, float]:
        """{"loss": ..., metric: mean, ...} over all processes; metrics that nothing was counted for are left out."""
        extremes = {name: metric for name, metric in self.metrics.items() if isinstance(metric, Largest)}
        names = sorted(self.metrics.keys() - extremes.keys())
        flat = [self.loss, *(part for name in names for part in self.metrics[name])]
        summed = accelerator.reduce(torch.stack([x.double() for x in flat]), "sum").tolist()
        pairs = zip(names, summed[1::2], summed[2::2], strict=True)
        means = {name: total / count for name, total, count in pairs if count}
        means |= _over_processes(extremes, accelerator) if extremes else {}
        if "rewards/chosen" in means and "rewards/rejected" in means:  # of unpaired examples too
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return {"loss": summed[0], **means}


def _over_processes(extremes: Mapping[str, Largest], accelerator: Accelerator) -> dict[str, float]:
    """The extremes of all processes, in one gathering."""
    names = sorted(extremes)
    mine = torch.stack([part.double() for name in names for part in extremes[name]])
    everyone = accelerator.gather(mine).view(-1, len(names), 2).cpu()
    joined = {
        name: functools.reduce(Largest.joined, [type(extremes[name])(*pair) for pair in everyone[:, i]])
        for i, name in enumerate(names)
    }
    return {name: metric.value for name, metric in joined.items() if metric.count}


def on(device: torch.device, metrics: Mapping[str, Mean]) -> dict[str, Mean]:
    """The same on the device."""
    return {name: type(mean)(*(x.to(device) for x in mean)) for name, mean in metrics.items()}
