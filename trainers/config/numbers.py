"""Ranges that options share, and their check."""

from __future__ import annotations

import math
from typing import Annotated, Any

from logratio.losses.options import Range, out_of_range

from ..errors import UserError

Seed = Annotated[int, Range(0, 2**32 - 1)]  # NumPy takes no other
NotNegativeCount = Annotated[int, Range(0)]
Steps = Annotated[int | float, Range(0, above=True)]
"""A whole number of them or, below 1, a share of all that there are, as transformers has it."""
NotNegativeSteps = Annotated[int | float, Range(0)]


def check_numbers(config: Any) -> None:
    """Raise UserError for the first number that is not finite or outside the range in its annotation."""
    for name, value, must in out_of_range(config):
        raise UserError(f"--{name} {must}, got {value}")


def check_whole(config: Any, *names: str) -> None:
    """Raise UserError for the first of these `Steps` that is above 1 and not whole."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value > 1 and value != int(value):
            raise UserError(f"--{name} {value} must be a whole number, or a share below 1")


def number_of(steps: float | None, total: int) -> int | None:
    """How many of `total` steps (or rows) that is. A share is rounded up, as transformers does; 1/3 of 300 is 100,
    whatever the float's last digit."""
    if steps is None or steps >= 1:
        return None if steps is None else int(steps)
    return math.ceil(steps * total - 1e-9)
