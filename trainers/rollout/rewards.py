"""Rewards for GRPO in TRL's signature, and how one is named on the command line.

A reward is called once for all completions of a step (and once more for ReMax's greedy answers), and returns one
number for each of them, or None where it has no opinion:

    reward(prompts=..., completions=..., completion_ids=..., max_completion_length=..., **columns)

prompts and completions are as in the data set: text, or messages. completion_ids are the generated tokens, without
padding. Every further column of the data set comes as a list by its own name. A reward takes what it needs by name
and the rest with `**_`.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from ..data.tokenization import Text
from ..errors import UserError
from ..plugins import import_object

Reward = Callable[..., Sequence[float | None]]

_MARKER = re.compile(r"####|\b[Aa]nswer(?: is|:)|(?m:^)A:|\\boxed\{")
# A minus is a sign only where nothing stands before it that it could be subtracted from.
_NUMBER = re.compile(r"(?<![\w.])(?:(?<!\))-)?\d+(?:,\d{3})*(?:\.\d+)?|(?<![\w.])-?\.\d+")


def text_of(completion: Text) -> str:
    """A completion's text: its own, or that of its last message."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")


def final_answer(text: str) -> str | Decimal:
    """What a text says its answer is.

    That is the first number after the last marker (`####`, `answer is`, `answer:`, `\\boxed{`, or `A:` at the start
    of a line); in a text without a marker its last number; and where there is no number, the words after the marker
    up to the line's end, or the last line, in lower case. Numbers are compared as such: "1,000.0" equals "1000".
    """
    markers = list(_MARKER.finditer(text))
    said = text[markers[-1].end() :] if markers else text
    numbers = _NUMBER.findall(said)
    if numbers:
        return Decimal(numbers[0 if markers else -1].replace(",", ""))
    lines = said.strip().splitlines() or [""]
    return lines[0 if markers else -1].strip().strip(".}$ ").lower()


def exact_answer(completions: list[Text], answer: list[Any], **_: Any) -> list[float | None]:
    """1 where the completion's `final_answer` is that of the column `answer`, else 0."""
    return [
        float(final_answer(text_of(completion)) == final_answer(str(expected)))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def answer_format(completions: list[Text], **_: Any) -> list[float | None]:
    """1 where the last line is a marked number, as "A: 20" or "#### 20", and nothing else, else 0."""
    return [
        float(re.search(r"(?:^|\n)(?:A:|####) ?-?\d[\d,]*(?:\.\d+)?\s*\Z", text_of(completion)) is not None)
        for completion in completions
    ]


def overlong(completion_ids: list[list[int]], max_completion_length: int, **_: Any) -> list[float | None]:
    """0 up to four fifths of `max_completion_length` tokens, then falling evenly to -1 at all of it.

    The soft overlong punishment of DAPO (arXiv:2503.14476, eq. 13), whose cache is one fifth of the length here.
    """
    cache = max_completion_length / 5
    free = max_completion_length - cache
    return [-min(1.0, max(0.0, (len(ids) - free) / cache)) for ids in completion_ids]


REWARDS: dict[str, Reward] = {reward.__name__: reward for reward in (exact_answer, answer_format, overlong)}
"""The rewards that have a name of their own."""


def load_reward(name: str) -> Reward:
    """The reward called `name`: one of `REWARDS`, or `module:function` (`import_object`)."""
    if ":" not in name:
        if name not in REWARDS:
            raise UserError(f"the reward {name!r} is unknown, expected one of {', '.join(REWARDS)}, or module:function")
        return REWARDS[name]
    reward = import_object(name, "reward")
    if not callable(reward) or inspect.isclass(reward):
        raise UserError(f"reward={name!r} must be a function, but is {type(reward).__name__}")
    return reward


def call_reward(
    name: str,
    reward: Reward,
    *,
    prompts: list[Text],
    completions: list[Text],
    completion_ids: list[list[int]],
    max_completion_length: int,
    columns: dict[str, list[Any]],
) -> list[float | None]:
    """What `reward` says of each completion, as float or None.

    Raises UserError where it needs a column that the data set lacks, or answers with anything but one number or
    None for each completion.
    """
    given: dict[str, Any] = {
        **columns,
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
        "max_completion_length": max_completion_length,
    }
    for parameter in inspect.signature(reward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name in given:
            continue
        if parameter.default is parameter.empty:
            raise UserError(
                f"the reward {name!r} needs the column {parameter.name!r}, "
                f"but the data set has only {', '.join(columns) or 'the prompt'}"
            )
    values = list(reward(**given))
    if len(values) != len(completions):
        raise UserError(f"the reward {name!r} returned {len(values)} numbers for {len(completions)} completions")
    return [_number(name, value) for value in values]


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"the reward {name!r} must return numbers or None, got {value!r}") from None
    if not math.isfinite(number):
        raise UserError(f"the reward {name!r} must return finite numbers or None, got {value!r}")
    return number
