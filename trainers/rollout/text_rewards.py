"""Rewards of a completion's text alone, whether the data set's prompts are text or messages.

--reward_funcs logratio.trainers.rollout.text_rewards:format_reward
"""

from __future__ import annotations

import re
from typing import Any

from ..data.tokenization import Text
from .answers import text_of

LONGEST = 500
"""Characters from which on a completion's length is worth nothing."""


def format_reward(completions: list[Text], **_: Any) -> list[float]:
    """1 where the text has <answer>...</answer> in it, else 0."""
    return [float(re.search(r"<answer>.*?</answer>", text_of(one), re.DOTALL) is not None) for one in completions]


def length_reward(completions: list[Text], **_: Any) -> list[float]:
    """1 for no text, falling evenly to 0 at `LONGEST` characters."""
    return [max(0.0, 1 - len(text_of(one)) / LONGEST) for one in completions]
