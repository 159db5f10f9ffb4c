"""Ranges that options share, and their check."""

from __future__ import annotations

from typing import Annotated, Any

from logratio.losses.options import Range, out_of_range

from ..errors import UserError

Seed = Annotated[int, Range(0, 2**32 - 1)]  # NumPy takes no other
NotNegativeCount = Annotated[int, Range(0)]


def check_numbers(config: Any) -> None:
    """Raise UserError for the first number that is not finite or outside the range in its annotation."""
    for name, value, must in out_of_range(config):
        raise UserError(f"--{name} {must}, got {value}")
