"""Values as a row of bars, a column each."""

from __future__ import annotations

import math
from collections.abc import Sequence

BARS, PLAIN = "▁▂▃▄▅▆▇█", "_.-=+*#@"
"""From the smallest value to the largest; for a terminal that knows ASCII alone."""


def sparkline(values: Sequence[float], width: int, *, plain: bool = False) -> str:
    """The last `width` of the values, at most as many columns; a blank where one is not finite."""
    last, bars = list(values)[-width:] if width > 0 else [], PLAIN if plain else BARS
    known = [value for value in last if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    top = len(bars) - 1

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return " "
        if high == low:
            return bars[top // 2]
        # halves, since the difference of the largest floats is none
        share = (value / 2 - low / 2) / (high / 2 - low / 2)
        return bars[min(top, int(share * len(bars)))]

    return "".join(map(bar, last))
