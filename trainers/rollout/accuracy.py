"""The mathematics of answers, with math-verify (`pip install -e ".[math]"`).

Differs from TRL 1.16's reward of the same name:
1. The right answer may stand in the column `answer` too, and completions may be plain text.
2. A right answer without any LaTeX delimiters, as `3\\pi`, is read as the formula that it is. There it is searched for
   a number: `3\\pi` is 3, so that \\boxed{3} is right and \\boxed{3\\pi} wrong; and `x^2+1`, where no number is found,
   is left unscored.
3. In prose without delimiters only a number that stands for itself is read (`final_answer`); there the first that is
   found.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import threading
from decimal import Decimal
from typing import Any

from ..data.tokenization import Text
from ..errors import UserError
from .answers import final_answer, text_of
from .calling.asked import main_thread

_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")
_COMMAND = re.compile(r"\\(?:text|mathrm|textbf)\{[^}]*\}|\\[A-Za-z]+")
_PARSING_SECONDS, _COMPARING_SECONDS = 10, 5


def check_installed() -> None:
    """UserError where math-verify is not there."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("the reward 'accuracy_reward' needs math-verify: pip install 'math-verify>=0.9,<0.10'")


@main_thread
def accuracy_reward(
    completions: list[Text], solution: list[Any] | None = None, answer: list[Any] | None = None, **_: Any
) -> list[float | None]:
    """1 where a completion's answer equals the right one as mathematics, else 0; None where that one cannot be read.

    A completion says its answer as LaTeX: in `\\boxed{}`, or as `the final answer is $...$`. The right one is in the
    column `solution`, or else in `answer`.
    """
    check_installed()
    from math_verify import verify

    right = solution if solution is not None else answer
    if right is None:
        raise UserError("the data set has neither of the columns 'solution' and 'answer'")
    # its time limits are alarms, which only the main thread can set
    limited = threading.current_thread() is threading.main_thread()
    for name in ("math_verify.parser", "math_verify.grader") if not limited else ():
        logging.getLogger(name).setLevel(logging.ERROR)  # that there is no limit
    scores: list[float | None] = []
    for completion, expected in zip(completions, right, strict=True):
        gold = _right_answer("" if expected is None else str(expected), _PARSING_SECONDS if limited else None)
        if not gold:
            scores.append(None)
            continue
        said = _said(text_of(completion), _PARSING_SECONDS if limited else None)
        scores.append(float(verify(gold, said, timeout_seconds=_COMPARING_SECONDS if limited else None)))
    return scores


def _right_answer(text: str, seconds: int | None) -> list[Any]:
    from math_verify import parse

    text = text.rpartition("####")[2].strip()
    if not _DELIMITED.search(text):
        if re.search(r"[A-Za-z]{2}", _COMMAND.sub("", text)):
            number = final_answer(text)
            text = str(number) if isinstance(number, Decimal) else ""
        text = text and f"${text}$"
    return list(parse(text, parsing_timeout=seconds))


def _said(text: str, seconds: int | None) -> list[Any]:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    latex = LatexExtractionConfig(
        boxed_match_priority=0,  # before any other place
        try_extract_without_anchor=False,  # not the last formula that happens to stand there
        normalization_config=NormalizationConfig(units=True),
    )
    return list(parse(text, extraction_config=[latex], extraction_mode="first_match", parsing_timeout=seconds))
