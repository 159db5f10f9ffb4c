"""How rewards are called: what they are given, what they may answer with, and what is said where one fails."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.tokenization import Text, shown
from ..errors import UserError
from .kept import check_extra

Reward = Callable[..., Any]

GIVEN = (
    "prompts",
    "completions",
    "completion_ids",
    "max_completion_length",
    "trainer_state",
    "log_extra",
    "log_metric",
)
"""What every reward may take by name, beside the columns of the data set."""

LARGEST = torch.finfo(torch.float32).max
_FAILURES = (Exception, SystemExit, asyncio.CancelledError)  # an interrupt is none
_HINTS = {"prompt": "it is given as 'prompts'", "completion": "it is given as 'completions'"}
_TAKEN = {"step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "tokens", "tokens_per_s", "step_ms"}
_TAKEN |= {"peak_mem_mib", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy"}
_TAKEN |= {"rollout_ms", "rollout_tokens_per_s", "rollout_wait_ms"}
_TAKEN_PREFIXES = ("rewards/", "completions/", "clip_ratio/", "sampling/", "dynamic/", "eval_")


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
        text = self.completions[index]
        text = text if isinstance(text, str) else str(text[-1].get("content") or "")
        return f"completion {number} of row {row} of the data set, {text[:57] + '...' if len(text) > 60 else text!r}"


def check_signature(name: str, reward: Reward, columns: Collection[str]) -> None:
    """UserError where the reward wants what it will not be given, or a column has the name of what it is given."""
    for column in columns:
        if column in GIVEN:
            raise UserError(
                f"the data set has a column {column!r}, but rewards are given something else by that name: rename it"
            )
    for parameter in _parameters(reward):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise UserError(f"the reward {name!r} takes {parameter.name!r} by position, but is called by name")
        if parameter.default is parameter.empty and parameter.name not in (*GIVEN, *columns):
            hint = _HINTS.get(parameter.name)
            raise UserError(
                f"the reward {name!r} needs {parameter.name!r}, which is neither a column of the data set "
                f"({', '.join(columns) or 'which has only the prompt'}) nor one of {', '.join(GIVEN)}"
                + (f": {hint}" if hint else "")
            )


def call_rewards(
    rewards: Mapping[str, Reward], asked: Asked, *, max_completion_length: int, state: TrainerState, log: RewardLog
) -> list[list[float | None]]:
    """What each reward says of every completion; None where it has no opinion. Async ones run side by side.

    Raises UserError where one fails, or answers with anything but a finite number or None for each completion.
    """
    results: dict[str, Any] = {}
    waiting: dict[str, Awaitable[Any]] = {}
    try:
        for name, reward in rewards.items():
            given = {  # lists of its own, so that no reward changes what another one sees, or what is trained on
                **{column: list(values) for column, values in asked.columns.items()},
                "prompts": list(asked.prompts),
                "completions": list(asked.completions),
                "completion_ids": [list(ids) for ids in asked.completion_ids],
                "max_completion_length": max_completion_length,
                "trainer_state": state,
                "log_extra": log.log_extra,
                "log_metric": log.log_metric,
            }
            try:
                results[name] = reward(**_taken(reward, given))
            except _FAILURES as error:
                raise _failed(name, error, asked) from error
            if inspect.isawaitable(results[name]):
                waiting[name] = results[name]
        if waiting:
            results |= _awaited(waiting, asked)
    finally:
        for awaitable in waiting.values():
            if inspect.iscoroutine(awaitable):
                awaitable.close()  # without effect where it was awaited
    return [_numbers(name, results[name], asked) for name in rewards]


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


AS_MESSAGES = ', each a list of messages, whose text is completion[0]["content"]'


class _Stopped(Exception):
    """Carries what a coroutine raised out of the event loop's thread, which a BaseException would end."""

    def __init__(self, name: str, error: BaseException) -> None:
        self.name, self.error = name, error


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One for the whole process, since what rewards keep (a client, a lock) belongs to a loop; in a thread, since the
    caller may be in a loop of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _awaited(waiting: Mapping[str, Awaitable[Any]], asked: Asked) -> dict[str, Any]:
    async def one(name: str, awaitable: Awaitable[Any]) -> Any:
        try:
            return await awaitable
        except BaseException as error:
            raise _Stopped(name, error) from error

    async def together() -> list[Any]:
        tasks = [asyncio.ensure_future(one(*item)) for item in waiting.items()]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    running = asyncio.run_coroutine_threadsafe(together(), _event_loop())
    try:
        return dict(zip(waiting, running.result(), strict=True))
    except _Stopped as stopped:
        if isinstance(stopped.error, _FAILURES):
            raise _failed(stopped.name, stopped.error, asked) from stopped.error
        raise stopped.error from None
    except BaseException:
        running.cancel()
        raise


def _failed(name: str, error: BaseException, asked: Asked) -> UserError:
    if isinstance(error, UserError):
        return UserError(f"the reward {name!r}: {error}")
    if isinstance(error, SystemExit):
        return UserError(f"the reward {name!r} wanted to end the program (SystemExit: {error})")
    rows = sorted(set(asked.rows))
    more = f" and {len(rows) - 16} more" if len(rows) > 16 else ""
    said = " ".join(str(error).split())
    return UserError(
        f"the reward {name!r} raised {type(error).__name__}{f': {said}' if said else ''}{_line(error)}; it was called "
        f"with {len(asked.completions)} completions (rows {', '.join(map(str, rows[:16]))}{more} of the data set)"
        + (AS_MESSAGES if isinstance(asked.completions[0], list) else "")
    )


def _line(error: BaseException) -> str:
    """Where in the reward's file it was raised, or in what it called from there."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    if not frames:
        return ""
    frame = [f for f in frames if f.filename == frames[0].filename][-1]
    return f" ({frame.filename}, line {frame.lineno})"


def _numbers(name: str, result: Any, asked: Asked) -> list[float | None]:
    """One for each completion; tensors and arrays are taken as lists are."""
    if isinstance(result, torch.Tensor) or hasattr(result, "tolist"):
        result = result.tolist()
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__iter__"):
        raise UserError(
            f"the reward {name!r} must return a list with a number or None for each of "
            f"{len(asked.completions)} completions, got {shown(result)}"
        )
    try:
        values = list(result)
    except _FAILURES as error:  # of a generator
        raise _failed(name, error, asked) from error
    if len(values) != len(asked.completions):
        raise UserError(f"the reward {name!r} returned {len(values)} numbers for {len(asked.completions)} completions")
    numbers: list[float | None] = []
    for index, value in enumerate(values):
        number = None if value is None else finite(value)
        if number is None and value is not None:
            raise UserError(
                f"the reward {name!r} must return a finite number (in float32, too) or None for {asked.place(index)}: "
                f"got {shown(value)}"
            )
        numbers.append(number)
    return numbers


def finite(value: Any) -> float | None:
    """A number, or a scalar of a library, as a float; None where it is none, or not one that float32 holds."""
    try:
        value = value.item() if hasattr(value, "item") else value
        number = math.nan if isinstance(value, str | bytes | bytearray) else float(value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return None
    return number if abs(number) <= LARGEST else None


def names_of(rewards: Sequence[tuple[str, Reward]]) -> list[str]:
    """A name for the metrics of each reward, all different. rewards: as written on the command line, and loaded.

    TRL's: the function's, or the class's of an object; the second of one name is called name_2, and so on.
    """
    names: list[str] = []
    for spec, reward in rewards:
        while isinstance(reward, functools.partial):
            reward = reward.func
        name = getattr(reward, "__name__", type(reward).__name__)
        if not name.isidentifier():  # a lambda
            name = spec.rpartition(":")[2]
        unique, number = name, 1
        while unique in names:
            number += 1
            unique = f"{name}_{number}"
        names.append(unique)
    return names
