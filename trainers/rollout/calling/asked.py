"""What rewards are asked, and what they are given to say it with."""

from __future__ import annotations

import functools
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ...data.examples import REWARD_ARGUMENTS
from ...data.tokenization import Text
from ...errors import UserError, shown
from ..answers import text_of
from ..kept import check_extra

Reward = Callable[..., Any]
R = TypeVar("R", bound=Reward)

LARGEST = torch.finfo(torch.float32).max
_HINTS = {"prompt": "it is given as 'prompts'", "completion": "it is given as 'completions'"}
_TAKEN = {"step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "tokens", "tokens_per_s", "step_ms"}
_TAKEN |= {"peak_mem_mib", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy"}
_TAKEN |= {"rollout_ms", "rollout_tokens_per_s", "rollout_wait_ms"}
_TAKEN_PREFIXES = ("rewards/", "completions/", "clip_ratio/", "sampling/", "dynamic/", "eval_")


class CompletionError(UserError):
    """A reward cannot say anything of one completion. index: among those that it is asked about."""

    def __init__(self, index: int, text: str) -> None:
        super().__init__(text)
        self.index = index


@dataclass
class TrainerState:
    """How far training is: of TRL's trainer_state what there is here.

    global_step: optimizer steps done. max_steps: of the run.
    """

    global_step: int = 0
    max_steps: int = 0
    steps_per_epoch: int = 1

    @property
    def epoch(self) -> float:
        return self.global_step / self.steps_per_epoch


@dataclass
class RewardLog:
    """What rewards log beside what they return. metrics: the values of each name. columns: of the table of completions,
    a text or None for each of the `completions` that the rewards are asked about."""

    completions: int = 0
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    columns: dict[str, list[str | None]] = field(default_factory=dict)

    def log_metric(self, name: str, value: Any) -> None:
        """Add a value to the metric, whose mean over the step's values on all processes is logged."""
        if not isinstance(name, str) or name in _TAKEN or name.startswith(_TAKEN_PREFIXES):
            raise UserError(f"log_metric cannot take the name {name!r}, which the log uses itself: choose another")
        number = finite(value)
        if number is None:
            raise UserError(f"log_metric({name!r}) takes a finite number, got {shown(value)}")
        self.metrics[name].append(number)

    def log_extra(self, column: str, values: Any) -> None:
        """Add a column to the table of completions, with a value for each of them."""
        name, texts = check_extra(column, values, self.completions)
        if self.columns.setdefault(name, texts) != texts:
            raise UserError(f"log_extra({name!r}, ...) was given other values before: choose another name")

    def add(self, other: RewardLog) -> None:
        """What another reward logged of the same completions, behind what is here."""
        for name, values in other.metrics.items():
            self.metrics[name] += values
        for column, texts in other.columns.items():
            self.log_extra(column, texts)


@dataclass(frozen=True)
class Asked:
    """What the rewards of one call are asked about: lists as long as `completions`. rows: of the prompts in the data
    set, for messages."""

    prompts: list[Text]
    completions: list[Text]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    rows: list[int]

    def place(self, index: int) -> str:
        """Which completion it is, for a message."""
        row = self.rows[index]
        number = self.rows[:index].count(row)
        text = text_of(self.completions[index])
        return f"completion {number} of row {row} of the data set, {text[:57] + '...' if len(text) > 60 else text!r}"

    def question(self, reward: Reward, log: RewardLog, **more: Any) -> Callable[[], Any]:
        """The call of one reward, which logs into a log of its own. more: what else it may take by name."""
        given = {  # lists of its own, so that no reward changes what another one sees, or what is trained on
            **{column: list(values) for column, values in self.columns.items()},
            "prompts": list(self.prompts),
            "completions": list(self.completions),
            "completion_ids": [list(ids) for ids in self.completion_ids],
            "log_extra": log.log_extra,
            "log_metric": log.log_metric,
            **more,
        }
        taken = _taken(reward, given)

        def ask() -> Any:
            answer = reward(**taken)
            return list(answer) if isinstance(answer, Iterator) else answer  # a generator does its work when it is read

        return ask


def check_signature(name: str, reward: Reward, columns: Collection[str], *, more: bool = False) -> None:
    """UserError where the reward wants what it will not be given. more: it may be given others, too."""
    for parameter in _parameters(reward):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise UserError(f"the reward {name!r} takes {parameter.name!r} by position, but is called by name")
        if parameter.default is parameter.empty and not more and parameter.name not in (*REWARD_ARGUMENTS, *columns):
            hint = _HINTS.get(parameter.name)
            raise UserError(
                f"the reward {name!r} needs {parameter.name!r}, which is neither a column of the data set "
                f"({', '.join(columns) or 'which has only the prompt'}) nor one of {', '.join(REWARD_ARGUMENTS)}"
                + (f": {hint}" if hint else "")
            )


def _parameters(reward: Reward) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(reward).parameters.values())
    except (TypeError, ValueError):  # of what is not written in Python
        return [inspect.Parameter("given", inspect.Parameter.VAR_KEYWORD)]


def _taken(reward: Reward, given: dict[str, Any]) -> dict[str, Any]:
    """What of it the reward takes."""
    parameters = _parameters(reward)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return given
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in given.items() if name in names}


def finite(value: Any) -> float | None:
    """A number, or a scalar of a library, as a float; None where it is none, or not one that float32 holds."""
    try:
        value = value.item() if hasattr(value, "item") else value
        number = math.nan if isinstance(value, str | bytes | bytearray) else float(value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return None
    return number if abs(number) <= LARGEST else None


def main_thread(reward: R) -> R:
    """The reward, marked as one that is called in the thread that trains, whatever runs beside it: only there an alarm
    (`signal.alarm`) can be set."""
    reward.main_thread = True  # type: ignore[attr-defined]
    return reward


def unwrapped(reward: Any) -> Any:
    """The function or object under partials."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward


def names_of(rewards: Sequence[tuple[str, Reward]]) -> list[str]:
    """A name for the metrics of each reward, all different. rewards: as written on the command line, and loaded.

    TRL's: the function's, or the class's of an object; the second of one name is called name_2, and so on.
    """
    names: list[str] = []
    for spec, reward in rewards:
        reward = unwrapped(reward)
        name = getattr(reward, "__name__", type(reward).__name__)
        if name == "<lambda>":
            name = spec.rpartition(":")[2]
        unique, number = name, 1
        while unique in names:
            number += 1
            unique = f"{name}_{number}"
        names.append(unique)
    return names
