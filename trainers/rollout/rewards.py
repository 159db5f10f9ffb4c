"""Rewards for GRPO in TRL's signature, and how one is named on the command line.

A reward is called once for all completions of a step (and once more for ReMax's greedy answers), and returns one
number for each of them, or None where it has no opinion:

    reward(prompts=..., completions=..., completion_ids=..., max_completion_length=..., trainer_state=...,
           log_metric=..., log_extra=..., **columns)

prompts and completions are as in the data set: text, or messages. completion_ids are the generated tokens, without
padding. Every further column of the data set comes as a list by its own name. trainer_state has global_step,
max_steps and epoch. log_metric(name, value) adds a metric to the step's, log_extra(column, values) a column to the
table of completions. A reward takes what it needs by name. It may be an async function, an
object that can be called, a class of such objects that is made without arguments, or a model (`reward_model.py`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..data.tokenization import Text
from ..errors import UserError
from ..ground.given import given
from ..ground.plugins import import_object, names_a_model
from .accuracy import accuracy_reward, check_installed
from .answers import final_answer, text_of
from .calling.asked import Reward, check_signature, names_of
from .reward_model import OwnReward, reward_model

CPU = torch.device("cpu")


def exact_answer(completions: list[Text], answer: list[Any], **_: Any) -> list[float | None]:
    """1 where the completion's `final_answer` is that of the column `answer`, else 0; None where that is null."""
    return [
        None if expected is None else float(final_answer(text_of(completion)) == final_answer(str(expected)))
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


REWARDS: dict[str, Reward] = {
    reward.__name__: reward for reward in (exact_answer, accuracy_reward, answer_format, overlong)
}
"""The rewards that have a name of their own."""


def load_rewards(
    specs: Sequence[str],
    columns: Collection[str],
    *,
    more: bool = False,
    device: torch.device = CPU,
    dtype: str = "float32",
) -> dict[str, Reward]:
    """The rewards that the command line names, by the names of their metrics.

    columns: of the data set, beside the prompt. more: there will be others, which are not known yet. device, dtype: of
    reward models. Raises UserError where there is no reward, or one wants something else.
    """
    if not specs:
        raise UserError("--reward_funcs names no reward function, so nothing could be learned: name at least one")
    rewards = [load_reward(spec, device, dtype) for spec in specs]
    named = dict(zip(names_of(list(zip(specs, rewards, strict=True))), rewards, strict=True))
    for name, reward in named.items():
        check_signature(name, reward, columns, more=more)
        if reward is accuracy_reward and not more and not {"solution", "answer"} & set(columns):
            raise UserError(f"the reward {name!r} needs the column 'solution' or 'answer', the right answer in LaTeX")
    return named


def load_reward(name: str, device: torch.device = CPU, dtype: str = "float32") -> Reward:
    """The reward called `name`: one of `REWARDS`, `module:function` (`import_object`), or a reward model."""
    if (own := given(name)) is not None:
        return checked(own, name, device, dtype)
    if ":" not in name:
        if name not in REWARDS:
            if names_a_model(name):
                return reward_model(name, device, dtype)
            raise UserError(
                f"the reward {name!r} is unknown, expected one of {', '.join(REWARDS)}, module:function, or a reward "
                "model: its folder, or its name on the Hub (OWNER/NAME)"
            )
        if REWARDS[name] is accuracy_reward:
            check_installed()
        return REWARDS[name]
    try:
        reward = import_object(name, "reward")
    except SystemExit as error:
        raise UserError(f"reward={name!r}: its module wanted to end the program (SystemExit: {error})") from error
    return checked(reward, name, device, dtype)


def checked(reward: Any, name: str, device: torch.device, dtype: str) -> Reward:
    """What is called, of whatever has been named. Raises UserError where that is nothing to call."""
    if isinstance(reward, torch.nn.Module | OwnReward):
        return reward_model(reward, device, dtype)
    if inspect.isclass(reward) and issubclass(reward, torch.nn.Module):
        raise UserError(f"reward={name!r} is a class of models: name a model, or write a function that calls it")
    if inspect.isclass(reward):
        try:
            reward = reward()
        except (Exception, SystemExit) as error:
            raise UserError(
                f"reward={name!r} is a class of which no object could be made without arguments "
                f"({type(error).__name__}: {error}): make one in the module, and name that"
            ) from error
    if not callable(reward):
        raise UserError(f"reward={name!r} must be a function, but is {type(reward).__name__}")
    called: Reward = reward
    return called
