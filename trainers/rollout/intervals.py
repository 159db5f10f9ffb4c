"""Intervals of a share, apart from what samples: a report needs no models."""

from __future__ import annotations

import math

Z = 1.959964  # of the normal distribution, with 2.5 % above


def wilson(share: float, trials: float) -> tuple[float, float]:
    """The 95 % interval of a share that so many independent trials gave."""
    middle = share + Z**2 / (2 * trials)
    half = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    scale = 1 + Z**2 / trials
    return min(share, (middle - half) / scale), max(share, (middle + half) / scale)  # at 0 and 1 they round past it
