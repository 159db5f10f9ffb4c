"""Intervals of paired differences: against numbers by hand, and how often they hold what they promise."""

import math

import numpy as np
import pytest

from logratio.benchmarks.comparing import intervals
from logratio.benchmarks.comparing.intervals import Bootstrap, Estimate, compared

STUDENT_2 = {0.95: 4.303, 0.995: 14.089}
"""Quantiles of Student's distribution with two degrees of freedom, two-sided, from a printed table."""


def test_identical_contestants_differ_by_exactly_nothing():
    values = np.random.default_rng(0).random((3, 50))
    (one,) = compared({"a": values, "b": values.copy()})
    assert one.difference == Estimate(0.0, 0.0, 0.0, 0.0) and one.difference.sign == 0


def test_seeds_that_differ_give_students_interval():
    """Rows all alike, means of the seeds 1, 2 and 6: 3 -+ t sqrt(7 / 3), by hand."""
    values = np.repeat([[1.0], [2.0], [6.0]], 40, axis=1)
    for level, t in STUDENT_2.items():
        found = Bootstrap(3, 40).estimate(values, level)
        half = t * math.sqrt(7 / 3)
        assert found.mean == 3 and found.of_seeds == 1
        assert found.low == pytest.approx(3 - half, rel=0.12) and found.high == pytest.approx(3 + half, rel=0.12)


def test_rows_that_differ_give_the_normal_interval():
    """Seeds all alike, rows 0 and 1 half and half: 0.5 -+ 1.96 * 0.5 / sqrt(400), by hand."""
    values = np.tile(np.repeat([0.0, 1.0], 200), (3, 1))
    found = Bootstrap(3, 400).estimate(values)
    assert found.of_seeds == 0
    assert (found.low, found.high) == (pytest.approx(0.451, abs=0.004), pytest.approx(0.549, abs=0.004))


def test_pairing_takes_out_what_contestants_share():
    """Rows of very different worth, which b is 0.1 worse at, each: without pairs nothing would be seen."""
    rng = np.random.default_rng(1)
    a = rng.normal(0, 5, 100) + rng.normal(0, 0.02, (3, 100))
    b = a - 0.1 + rng.normal(0, 0.02, (3, 100))
    (one,) = compared({"a": a, "b": b})
    assert one.difference.sign == 1 and 0.08 < one.difference.low < 0.1 < one.difference.high < 0.12
    assert Bootstrap(3, 100).estimate(a).sign == 0


def test_several_comparisons_are_wider_by_bonferroni():
    rng = np.random.default_rng(2)
    metric = {name: rng.normal(0, 1, (4, 60)) for name in "abcde"}
    every, with_a = compared(metric), compared(metric, baseline="a")
    assert [(one.first, one.second) for one in with_a] == [(name, "a") for name in "bcde"]
    assert len(every) == 10 and (every[0].first, every[0].second) == ("a", "b")
    alone = Bootstrap(4, 60).estimate(metric["a"] - metric["b"], 1 - 0.05 / 10)
    assert every[0].difference == alone
    of_four = Bootstrap(4, 60).estimate(metric["b"] - metric["a"], 1 - 0.05 / 4)
    assert with_a[0].difference == of_four and of_four.high - of_four.low < alone.high - alone.low


def test_the_sign_is_that_of_an_interval_on_one_side_of_0():
    assert [Estimate(0, *ends, 0).sign for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0, 0.1))] == [1, -1, 0, 0]


@pytest.mark.parametrize(("seeds", "rows"), [(1, 10), (3, 1)])
def test_one_of_a_kind_says_nothing(seeds, rows):
    with pytest.raises(ValueError, match=f"two seeds and two rows at least, got {seeds} and {rows}"):
        Bootstrap(seeds, rows)
    with pytest.raises(ValueError, match=r"values must be \[3, 10\], got \[2, 10\]"):
        Bootstrap(3, 10).estimate(np.zeros((2, 10)))


def drawn(rng, seeds, rows, of_seeds, of_rows, of_both):
    """A difference of 0 between contestants, in a crossed design."""
    both = rng.normal(0, 1, (seeds, rows)) * of_both
    return rng.normal(0, of_seeds, (seeds, 1)) + rng.normal(0, of_rows, (1, rows)) + both


MIXTURES = [(0.1, 0, 0), (0, 1, 0), (0, 0, 1), (0.1, 1, 0), (0.1, 1, 1), (0.03, 0.5, 0.5), (1, 0.1, 0.1)]


@pytest.fixture
def coarse(monkeypatch):
    """Fewer draws, which are as right on average and ten times as quick."""
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    monkeypatch.setattr(intervals, "REPEATS", 10)


def covers(of_seeds, of_rows, of_both, times):
    rng, bootstrap = np.random.default_rng(3), Bootstrap(3, 60)
    found = [bootstrap.estimate(drawn(rng, 3, 60, of_seeds, of_rows, of_both)) for _ in range(times)]
    return sum(one.low <= 0 <= one.high for one in found) / times


@pytest.mark.parametrize("mixture", MIXTURES[1::2])
def test_an_interval_covers_what_it_says_whatever_varies(coarse, mixture):
    """Nineteen of twenty at least, of 300; three standard errors below 0.95 are 0.912."""
    assert covers(*mixture, times=300) > 0.912


@pytest.mark.slow
@pytest.mark.parametrize("mixture", MIXTURES)
def test_an_interval_covers_what_it_says_to_a_hundredth(coarse, mixture):
    assert covers(*mixture, times=5000) > 0.94


def test_a_bootstrap_over_seeds_and_rows_would_not():
    """Which is why there is Student's t in its place."""
    rng, covered = np.random.default_rng(3), 0
    for _ in range(200):
        values = drawn(rng, 3, 60, 0.1, 0.1, 0.1)
        seeds, rows = rng.integers(3, size=(200, 3)), rng.integers(60, size=(200, 60))
        means = values[seeds[:, :, None], rows[:, None, :]].mean((1, 2))
        low, high = np.quantile(means, [0.025, 0.975])
        covered += low <= 0 <= high
    assert covered / 200 < 0.87


def test_answers_that_are_right_or_wrong_are_covered_too(coarse):
    """Shares near 1, few rows, no seed unlike another: the difference of two contestants as good as each other."""
    rng, bootstrap = np.random.default_rng(4), Bootstrap(3, 100)
    difficulty = rng.random((300, 1, 100)) ** 0.2
    covered = 0
    for p in difficulty:
        a, b = (rng.binomial(4, np.broadcast_to(p, (3, 100))) / 4 for _ in range(2))
        found = bootstrap.estimate(a - b)
        covered += found.low <= 0 <= found.high
    assert covered / 300 > 0.912


def test_all_intervals_of_a_metric_hold_together(coarse, monkeypatch):
    """Five contestants as good as each other: in nineteen of twenty experiments none of ten pairs is said to differ."""
    made = Bootstrap(3, 40)
    monkeypatch.setattr(Bootstrap, "of", staticmethod(lambda seeds, rows: made))
    rng, wrong = np.random.default_rng(5), 0
    for _ in range(100):
        shared = rng.normal(0, 1, (1, 40))
        metric = {name: shared + drawn(rng, 3, 40, 0.05, 0.3, 0.3) for name in "abcde"}
        wrong += any(one.difference.sign for one in compared(metric))
    assert wrong / 100 <= 0.05
