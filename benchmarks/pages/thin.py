"""Curves of any length as few points that show the same: extremes stay, and the mean is drawn beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

POINTS = 1000
MEANS = 120
"""Points of the line of means."""
SHORT = 60
"""Values up to which a curve has no line of means: every one of them is seen."""

Curve = tuple["np.ndarray", "np.ndarray"]


def thinned(steps: Sequence[int], values: Sequence[float], points: int = POINTS) -> Curve:
    """At most about so many of the points: the first, the last, and of each stretch of steps the lowest and the
    highest. Values that are not finite stay as gaps (NaN), of which each stretch keeps one."""
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    y = np.where(np.isfinite(y), y, np.nan)
    if len(x) <= points:
        return x, y
    width = -(-len(x) // max(points // 2 - 1, 1))
    rows = -(-len(x) // width)
    padded = np.full(rows * width, np.nan)
    padded[: len(y)] = y
    table = padded.reshape(rows, width)
    missing = np.isnan(table)
    lowest, highest = np.where(missing, np.inf, table).argmin(1), np.where(missing, -np.inf, table).argmax(1)
    gaps = np.where(missing.any(1), missing.argmax(1), lowest)
    chosen = np.concatenate([at + np.arange(rows) * width for at in (lowest, highest, gaps)])
    chosen = np.unique(np.concatenate([[0], chosen[chosen < len(x)], [len(x) - 1]]))
    return x[chosen], y[chosen]


def means(steps: Sequence[int], values: Sequence[float], *, log: bool = False) -> Curve | None:
    """The mean over a window of a twentieth of the values around each of at most `MEANS` evenly spaced ones, at the
    ends over the part of it that is there; NaN where it has no finite value. None where the values are few.

    log: the geometric mean, which on a logarithmic scale lies in the middle.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(x) <= SHORT:
        return None
    finite = np.isfinite(y)
    y = np.where(finite, y, 1.0)  # of no weight
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, np.log(y) if log else y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    half = len(x) // 40
    at = np.unique(np.linspace(0, len(x) - 1, min(MEANS, len(x))).round().astype(int))
    start, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(x))
    found = counts[end] - counts[start]
    mean = np.where(found > 0, (sums[end] - sums[start]) / np.maximum(found, 1), np.nan)
    return x[at], np.exp(mean) if log else mean


def ticks(low: float, high: float, count: int) -> list[float]:
    """About so many round numbers within [low, high]: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.7)
    first = math.ceil(low / step - 1e-9)
    found: list[float] = []
    while (first + len(found)) * step <= high + step * 1e-9:
        found.append(float(f"{(first + len(found)) * step:.12g}"))
    return found


def decades(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], at most about five; with 2 and 5 times them where these are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    whole = [10.0**power for power in powers if low <= 10.0**power <= high]
    if len(whole) < 3:
        return [f * 10.0**power for power in powers for f in (1, 2, 5) if low <= f * 10.0**power <= high]
    return whole[:: -(-len(whole) // 5)]
