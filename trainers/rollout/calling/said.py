"""What rewards say: the numbers of their answers, and a sentence where there is none."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError, listed, shown
from .asked import Asked, CompletionError, finite

HERE = str(Path(__file__).parent)
AS_MESSAGES = ', each a list of messages, whose text is completion[0]["content"]'
ALARM = ("signal only works in main thread", "signal.alarm")  # as Python says it, and math_verify
FAILURES = (Exception, SystemExit, asyncio.CancelledError)  # an interrupt is none


def failed(name: str, error: BaseException, asked: Asked) -> UserError:
    if isinstance(error, CompletionError):
        return UserError(f"the reward {name!r}: {asked.place(error.index)}: {error}")
    if isinstance(error, UserError):
        return UserError(f"the reward {name!r}: {error}")
    if isinstance(error, SystemExit):
        return UserError(f"the reward {name!r} wanted to end the program (SystemExit: {error})")
    said = " ".join(str(error).split())
    remedy = ""
    if isinstance(error, ValueError) and any(word in said for word in ALARM):
        remedy = "; it sets an alarm, so mark it (REWARD.main_thread = True), and it is called where it can"
    return UserError(
        f"the reward {name!r} raised {type(error).__name__}{f': {said}' if said else ''}{raised_at(error, HERE)}; "
        f"{called_with(asked)}" + (AS_MESSAGES if isinstance(asked.completions[0], list) else "") + remedy
    )


def late(name: str, seconds: float, asked: Asked) -> UserError:
    return UserError(
        f"the reward {name!r} has not answered within {seconds:g} s (--reward_timeout); {called_with(asked)}: "
        "allow it a longer time, or let it return None for what takes it too long"
    )


def called_with(asked: Asked) -> str:
    rows = listed(sorted(set(asked.rows)))
    return f"it was called with {len(asked.completions)} completions (rows {rows} of the data set)"


def raised_at(error: BaseException, here: str) -> str:
    """Where in a user's file it was raised, or in what that called. here: the folder or file that called it, and all
    whose names begin so."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(here)]
    if not frames:
        return ""
    frame = [f for f in frames if f.filename == frames[0].filename][-1]
    return f" ({frame.filename}, line {frame.lineno})"


def numbers(name: str, result: Any, asked: Asked) -> list[float | None]:
    """One for each completion; tensors and arrays are taken as lists are. UserError for anything else."""
    if hasattr(result, "tolist"):
        result = result.tolist()
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__iter__"):
        raise UserError(
            f"the reward {name!r} must return a list with a number or None for each of "
            f"{len(asked.completions)} completions, got {shown(result)}"
        )
    try:
        values = list(result)
    except FAILURES as error:  # of a generator
        raise failed(name, error, asked) from error
    if len(values) != len(asked.completions):
        raise UserError(f"the reward {name!r} returned {len(values)} numbers for {len(asked.completions)} completions")
    found: list[float | None] = []
    for index, value in enumerate(values):
        number = None if value is None else finite(value)
        if number is None and value is not None:
            raise UserError(
                f"the reward {name!r} must return a finite number (in float32, too) or None for {asked.place(index)}: "
                f"got {shown(value)}"
            )
        found.append(number)
    return found
