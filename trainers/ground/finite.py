"""Numbers as they come from files, servers and people."""

from __future__ import annotations

import sys
from typing import Any


def is_finite(value: Any) -> bool:
    """Whether it is a number, and no bool, that a float can be: `math.isfinite` raises at an integer of 400 digits."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max
