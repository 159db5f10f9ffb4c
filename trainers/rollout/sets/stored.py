"""Windows of rollouts that steps to come learn from, as a checkpoint has them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from logratio.losses import Mean, Support

from ...batches.packing import split_groups
from ...batches.values import by_completion, of_completions
from ...data.examples import Completion, Example
from ...step import Step
from ...window import Window

SUPPORT = ("support_ids", "support_offsets")
LOGPS = ("old", "ref")  # of a micro-batch, that later steps are compared with


def distinct(windows: Sequence[Window]) -> list[Window]:
    """Each of them once."""
    return list({id(window): window for window in windows}.values())


def turns(windows: Sequence[Window]) -> list[int]:
    """Which of the distinct ones comes when."""
    numbers = {id(window): number for number, window in enumerate(distinct(windows))}
    return [numbers[id(window)] for window in windows]


def unpacked(window: Window) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """This process's share of a window of rollouts, whatever its micro-batches: (examples and metrics as JSON, {"old",
    "ref": the log-probs of all scored tokens in the order of the examples; and their support})."""
    share = {
        "examples": [dataclasses.asdict(plain(example)) for example in window.examples],
        "metrics": {name: [float(total), float(count)] for name, (total, count) in window.metrics.items()},
        "taken": window.taken,
    }
    kept = {}
    for name in LOGPS:
        table = by_completion((m.batch, getattr(m, name)) for m in window.micros if getattr(m, name) is not None)
        if table:
            kept[name] = torch.cat([table[id(c)] for example in window.examples for c in example.completions])
    completions = [c for example in window.examples for c in example.completions]
    if any(c.support is not None for c in completions):
        support = Support.cat([c.support or Support.whole(len(c.ids)) for c in completions])
        kept |= dict(zip(SUPPORT, support, strict=True))
    return share, kept


def plain(example: Example, supports: Iterator[Support] | None = None) -> Example:
    """The example without its completions' support, which is no JSON, or with the next ones of these."""
    completions = [
        dataclasses.replace(c, support=None if supports is None else next(supports)) for c in example.completions
    ]
    return dataclasses.replace(example, completions=completions)


def restored(step: Step, shares: Sequence[Any], logps: Mapping[str, Tensor], position: Any) -> list[Window]:
    """The inverse. shares: of each process, by window. logps: "process/window/name" -> the tensors of that."""
    keys = {key: key.split("/") for key in logps}
    return [
        restored_window(
            step,
            [own[number] for own in shares],
            {f"{i}/{name}": logps[key] for key, (i, w, name) in keys.items() if int(w) == number},
            position,
        )
        for number in range(len(shares[0]))
    ]


def restored_window(step: Step, shares: Sequence[Any], logps: Mapping[str, Tensor], position: Any) -> Window:
    """One of them: on as many processes each its own share, on another number all of them dealt anew."""
    rank, world = step.accelerator.process_index, step.accelerator.num_processes
    examples = [[example_of(e) for e in share["examples"]] for share in shares]
    for i, own in enumerate(examples):
        if f"{i}/{SUPPORT[0]}" in logps:
            counts = [len(c.ids) for e in own for c in e.completions]
            supports = iter(Support(*(logps[f"{i}/{part}"] for part in SUPPORT)).split(counts))
            examples[i] = [plain(e, supports) for e in own]
    tables: dict[str, dict[int, Tensor]] = {name: {} for name in LOGPS}
    for (name, table), (i, own) in itertools.product(tables.items(), enumerate(examples)):
        if (values := logps.get(f"{i}/{name}")) is not None:
            completions = [c for e in own for c in e.completions]
            counts = [c.num_scored for c in completions]
            table |= {id(c): own for c, own in zip(completions, values.split(counts), strict=True)}
    if len(shares) == world:
        mine, metrics = examples[rank], shares[rank]["metrics"]
    else:
        everyone = [e for own in examples for e in own]
        mine, metrics = everyone[rank::world], summed([share["metrics"] for share in shares[rank::world]], shares)
    parts = split_groups(mine, step.micro_batch_tokens, step.policy.shared)
    micros = step.micro_batches(parts, dealt=True)
    for micro, (name, table) in itertools.product(micros, tables.items()):
        if table:
            setattr(micro, name, of_completions(micro.batch, table))
    means = {name: Mean(*torch.tensor(mean, dtype=torch.float64)) for name, mean in metrics.items()}
    return Window(mine, micros, means, dealt=True, taken=shares[0]["taken"], position=position)


def summed(some: Sequence[dict[str, list[float]]], shares: Sequence[Any]) -> dict[str, list[float]]:
    """The metrics of some shares together, 0 of 0 where none of them has one: every process has the same names."""
    names = sorted({name for share in shares for name in share["metrics"]})
    zero = [0.0, 0.0]
    return {name: [sum(m.get(name, zero)[i] for m in some) for i in (0, 1)] for name in names}


def example_of(entry: dict[str, Any]) -> Example:
    completions = [Completion(**completion) for completion in entry.pop("completions")]
    advantages = entry.pop("advantages")
    if advantages is not None:  # of tokens, where these are lists
        advantages = tuple(tuple(a) if isinstance(a, list) else a for a in advantages)
    return Example(**entry, completions=completions, advantages=advantages)
