"""How sure a difference between two contestants is: pairs within seed and held-out row, and both are only a sample.

A metric of contestant A with seed s on held-out row i is a(s, i). Both contestants have the same seeds (order of the
data, random numbers) and the same rows, so what is asked about is the paired difference d(s, i) = a(s, i) - b(s, i),
and its mean over all seeds and rows there might have been. Seeds and rows are crossed: every seed is asked every row.

    mean of d  +-  what other rows would have changed  +  what other seeds would have changed

Rows are many, so they are resampled (bootstrap: the means over seeds of n rows drawn with replacement). Seeds are few,
and three resampled have ten different means, which spread by sqrt(2/3) of what they should: a hierarchical bootstrap
over both covers far less than it says (in the tests, where seeds differ, about 0.8 for 0.95). So each draw adds, for
the seeds, s t / sqrt(S) in place of a resampled mean, with s the standard deviation of the S seeds' means and t
Student's with S - 1 degrees of freedom, which is exact where these means are normal. The sum of two such terms is
Fisher's solution of the Behrens-Fisher problem and known to cover at least what it says; part of the variance of rows
is in both (the noise of each seed on each row), which errs to the same side. What it cannot see is a seed unlike all
that were run.

Comparisons are several, and one of twenty intervals of 95 % misses even where all losses are alike. All those of one
metric hold together with 95 % or more, by Bonferroni: each has the level 1 - 0.05 / m. Holm's procedure would find a
difference a little more often, but has no intervals that say what its verdicts do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
"""[S, n]: a metric of one contestant, by seed and held-out row."""
LEVEL = 0.95
RESAMPLES = 4000
"""Of rows; each is met by `REPEATS` values of Student's distribution."""
REPEATS = 50
_SEED = 20261127


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval. of_seeds: the share of its variance that lies between seeds: where that is most of it,
    more seeds would narrow the interval, and where little, more rows."""

    mean: float
    low: float
    high: float
    of_seeds: float

    @property
    def sign(self) -> int:
        """1 or -1 where all of the interval is above or below 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Comparison:
    """`first` minus `second` in one metric."""

    first: str
    second: str
    difference: Estimate


class Bootstrap:
    """What all estimates of the same seeds and rows share: which rows each resample has, and Student's t."""

    def __init__(self, seeds: int, rows: int) -> None:
        if seeds < 2 or rows < 2:
            raise ValueError(f"an interval needs two seeds and two rows at least, got {seeds} and {rows}")
        rng = np.random.default_rng(_SEED)
        self.seeds, self.rows = seeds, rows
        self.weights = rng.multinomial(rows, np.full(rows, 1 / rows), RESAMPLES) / rows
        self.student = rng.standard_t(seeds - 1, (RESAMPLES, REPEATS))

    @staticmethod
    @lru_cache(maxsize=4)
    def of(seeds: int, rows: int) -> Bootstrap:
        """The same for all who ask, since its draws are."""
        return Bootstrap(seeds, rows)

    def estimate(self, values: Values, level: float = LEVEL) -> Estimate:
        """The mean of [S, n] values over all seeds and rows there might have been."""
        if values.shape != (self.seeds, self.rows):
            raise ValueError(f"values must be [{self.seeds}, {self.rows}], got {list(values.shape)}")
        mean = float(values.mean())
        if np.ptp(values) == 0:  # else they round to more than 0
            return Estimate(mean, mean, mean, 0.0)
        of_rows = self.weights @ values.mean(0)
        between = float(values.mean(1).std(ddof=1)) / math.sqrt(self.seeds)
        drawn = (of_rows[:, None] + between * self.student).ravel()
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        both = between**2 + float(of_rows.var())
        return Estimate(mean, float(low), float(high), between**2 / both)


def compared(metric: Mapping[str, Values], baseline: str | None = None) -> list[Comparison]:
    """Every pair of contestants, or each with the baseline, with intervals that hold together. metric: contestant ->
    its values, all of the same seeds and rows."""
    names = list(metric)
    each = combinations(names, 2) if baseline is None else ((name, baseline) for name in names if name != baseline)
    if not (pairs := list(each)):
        return []
    bootstrap = Bootstrap.of(*metric[names[0]].shape)
    level = 1 - (1 - LEVEL) / len(pairs)
    return [Comparison(a, b, bootstrap.estimate(metric[a] - metric[b], level)) for a, b in pairs]
