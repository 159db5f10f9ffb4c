"""What is kept of a step's completions: a row each, of all processes, in the order that one process would have."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from logratio.losses.advantages import sum_then_normalize

from ..data.examples import Completion
from ..errors import UserError
from ..window import MicroBatch
from .sets.rolled import Rolled

COLUMNS = (
    "step",
    "row",
    "prompt",
    "completion",
    "reward",
    "advantage",
    "completion_length",
    "finish_reason",
    "sampler_logp",
    "logp_diff",
    "policy_version",
    "engine",
)


def check_extra(column: Any, values: Any, completions: int) -> tuple[str, list[str | None]]:
    """What a reward gives to log_extra, as text: strings as they are, all else as JSON or Python has it.

    Raises UserError where it is no list with a value for each completion, or the column has a name of the table's own.
    """
    if isinstance(column, str):
        column = in_table(column)
    if not isinstance(column, str) or column in COLUMNS or column.startswith("rewards/"):
        raise UserError(f"log_extra cannot take the name {column!r}, a column of the table itself: choose another")
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise UserError(f"log_extra({column!r}, ...) takes a list with a value for each completion")
    given = [value if value is None else in_table(value) for value in values]
    if len(given) != completions:
        raise UserError(f"log_extra({column!r}, ...) got {len(given)} values for {completions} completions")
    return column, given


def in_table(value: Any) -> str:
    """The value as a text that Parquet takes: half of a surrogate pair, which no UTF-8 has, as it is escaped."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.encode("utf-8", "backslashreplace").decode()


def of_completions(advantages: Tensor, lengths: Tensor) -> Tensor:
    """[n]: advantages [prompts, G], or of tokens [prompts, G, T] their mean over the completion's, of `lengths`."""
    if advantages.ndim == 2:
        return advantages.flatten()
    inside = torch.arange(advantages.shape[2]) < lengths[..., None]
    return ((advantages * inside).sum(-1) / lengths.clamp(min=1)).flatten()


class Kept(NamedTuple):
    """A process's rows of a set of rollouts, by the place of their prompt among all processes', and their completions
    in the same order."""

    accelerator: Accelerator
    groups: Mapping[int, list[dict[str, Any]]]
    completions: list[Completion]


class Keeper:
    """What is kept of the rollouts since it was last taken, in their order.

    engine: what sampled them. weights: of the rewards, by whose names. wanted: False: nothing is kept.
    """

    def __init__(self, rewards: Sequence[str], weights: Tensor, engine: str, *, wanted: bool = True) -> None:
        self.rewards, self.weights, self.engine, self.wanted = list(rewards), weights, engine, wanted
        self.kept: list[Kept] = []

    def keep(self, step: int, rolled: Rolled, advantages: Tensor | None, accelerator: Accelerator) -> None:
        """step: that they are first learned from. advantages: None of those that nothing is learned from."""
        if not self.wanted:
            return
        group = rolled.by_function.shape[1]
        rows = self.rows(step, rolled, advantages)
        groups = {at: rows[i * group :][:group] for i, at in enumerate(rolled.places or range(len(rolled.examples)))}
        self.kept.append(Kept(accelerator, groups, [c for e in rolled.examples for c in e.completions]))

    def rows(self, step: int, rolled: Rolled, advantages: Tensor | None) -> list[dict[str, Any]]:
        """A row for each completion. A reward that nobody gave is None. completion_length: tokens that the model wrote;
        sampler_logp: the mean over them, in nats; logp_diff: see `differences`, not known yet; policy_version: the
        steps that the policy had taken which said it."""
        group = rolled.by_function.shape[1]
        by_function = rolled.by_function.flatten(0, 1).tolist()
        rewards = sum_then_normalize(rolled.by_function, self.weights).flatten().tolist()
        own = None if advantages is None else of_completions(advantages, rolled.lengths).tolist()
        return [
            {
                "step": step,
                "row": rolled.examples[i // group].row,
                "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False),
                "completion": rolled.texts[i],
                **{f"rewards/{name}": known(x) for name, x in zip(self.rewards, by_function[i], strict=True)},
                "reward": known(rewards[i]),
                "advantage": own and own[i],
                "completion_length": len(sample.own_logps),
                "finish_reason": sample.finish_reason,
                "sampler_logp": sum(sample.own_logps) / len(sample.own_logps) if sample.own_logps else None,
                "logp_diff": None,
                "policy_version": sample.version,
                "engine": self.engine,
                **{column: values[i] for column, values in rolled.extra.items()},
            }
            for i, (prompt, sample) in enumerate(zip(rolled.prompts, rolled.samples, strict=True))
        ]

    def taken(self) -> list[dict[str, Any]]:
        """The completions that were sampled for training since the last time, of all processes, which all call it;
        none on others than the main one, or where they are not kept."""
        kept, self.kept = self.kept, []
        return [row for some in kept for row in of_all(some.accelerator, some.groups)]

    def learned(self, micros: Sequence[MicroBatch]) -> None:
        """The trainer has seen them: let the completions that are kept say how far its log-probs are from the
        sampler's."""
        if self.kept:
            found = differences(micros)
            for _, groups, completions in self.kept:
                for row, completion in zip(chain.from_iterable(groups.values()), completions, strict=True):
                    row["logp_diff"] = found.get(id(completion), row["logp_diff"])


def differences(micros: Sequence[MicroBatch]) -> dict[int, float]:
    """id of a completion -> the mean over its scored tokens of |log pi - log mu|, in nats, where both are known: mu
    sampled it, pi is what its ratio is clipped to, or the policy of the first step on it (`sampling/logp_diff_mean`).
    """
    found: dict[int, float] = {}
    for micro in micros:
        own = micro.logps if micro.old is None else micro.old
        if own is None or micro.behavior is None or micro.batch.is_filler:
            continue
        scored = micro.batch.scored
        gaps = torch.where(scored, (own.double() - micro.behavior).abs(), 0.0).sum(-1)
        each = zip(micro.batch.completions, gaps.tolist(), scored.sum(-1).tolist(), strict=True)
        found |= {id(completion): gap / tokens for completion, gap, tokens in each if tokens}
    return found


def known(value: float) -> float | None:
    return None if math.isnan(value) else value


def of_all(accelerator: Accelerator, groups: Mapping[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of all processes, in the order of the prompts; for the main process, [] on the others.

    groups: this process's rows, by the place of their prompt among all processes'.
    """
    mine = [dict(groups)]
    shares = mine if accelerator.num_processes == 1 else gather_object(mine)
    if not accelerator.is_main_process:
        return []
    everyone = {place: rows for some in shares for place, rows in some.items()}
    return [row for place in sorted(everyone) for row in everyone[place]]
