"""What the lines of runs say in the end: which is better, what would tell more, and what the figures show of it."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from logratio.benchmarks.comparing.draw import curves, frontier, intervals, over_seeds
from logratio.benchmarks.comparing.intervals import Comparison, Estimate
from logratio.benchmarks.comparing.outcome import advice, as_lines, outcome, summary, verdict
from logratio.benchmarks.comparing.scores import METRICS
from logratio.benchmarks.comparing.told import NARROW, comparison_rows, contestant_rows
from logratio.benchmarks.reporting.tables import on_screen

ROWS = 8


def line(name, seed, reward, nll, status="ok", steps=4):
    """A run whose held-out rows lie closely around these means."""
    around = np.linspace(-0.01, 0.01, ROWS)
    start = {"steps": 0, "tokens": 0, "seconds": 0.0, "reward": 0.1, "nll": 3.0, "kl": 0.0}
    end = {"steps": steps, "tokens": 10, "seconds": 1.0, "reward": reward, "nll": nll, "kl": 2.0}
    rows = {"reward": list(reward + around), "nll": list(nll + around), "kl": list(2 + around)}
    told = {"own_loss": seed + 1.0, "train_s": 2.0, "steps": steps, "error": "too hot"}
    return {"contestant": name, "seed": seed, "status": status, "curve": [start, end], "rows": rows, **told}


LINES = [
    line("a", 1, 0.5, 1.02), line("a", 0, 0.5, 1.0),
    line("b", 0, 0.9, 2.0), line("b", 1, 0.9, 2.02, steps=8),
    line("c", 0, 0.9, 2.0), line("c", 1, 0.9, 2.02),
]  # fmt: skip


def test_the_best_is_that_of_the_highest_reward_or_the_lowest_nll():
    by_reward, by_nll = (outcome(LINES, ["a", "b", "c"], metric, None) for metric in (None, "nll"))
    assert (by_reward.metric, by_reward.ranked) == ("reward", ["b", "c", "a"])
    assert by_nll.ranked == ["a", "b", "c"]
    assert summary(by_reward) == "b has the best reward, better than a, no difference seen to c"
    assert summary(by_nll) == "a has the best nll, better than b and c"
    assert [run["seed"] for run in by_reward.runs["a"]] == [0, 1] and by_reward.start["nll"] == 3
    found = {(x["metric"], x["first"], x["second"]): x["verdict"] for x in as_lines(by_reward)}
    assert found["reward", "a", "b"] == "b is better" and found["nll", "a", "b"] == "a is better"
    assert found["kl", "a", "b"] == found["nll", "b", "c"] == "no difference seen" and len(found) == 9
    against = outcome(LINES, ["a", "b", "c"], None, "c").comparisons["reward"]
    assert [(one.first, one.second) for one in against] == [("a", "c"), ("b", "c")]


def test_a_contestant_that_failed_with_one_seed_is_in_no_comparison():
    failed = [*LINES[:5], line("c", 1, 0.9, 2.0, status="failed")]
    found = outcome(failed, ["a", "b", "c"], None, None)
    assert found.names == ["a", "b"] and found.failed == ["c with seed 1 failed: too hot"]


def test_where_nothing_differs_none_is_best_and_no_bound_is_claimed():
    """As of rewards that are 0 throughout: the interval has no width, and says nothing of what was not met."""
    found = outcome(LINES, ["b", "c"], None, None)
    assert summary(found) == "all have the same reward with every seed on every row, of which none is better"
    assert advice(found) == "" and not any(one.difference.sign for one in found.comparisons["reward"])


def compared(mean, low, high, of_seeds=0.5):
    return Comparison("a", "b", Estimate(mean, low, high, of_seeds))


def test_a_verdict_is_by_what_is_better_in_the_metric():
    above, below = compared(0.2, 0.1, 0.3), compared(-0.2, -0.3, -0.1)
    assert [verdict(one, "reward") for one in (above, below)] == ["a is better", "b is better"]
    assert [verdict(one, "nll") for one in (above, below)] == ["b is better", "a is better"]
    assert [verdict(one, "kl") for one in (above, below)] == ["a has more", "b has more"]
    assert verdict(compared(0.0, -0.1, 0.1), "reward") == "no difference seen"


@pytest.mark.parametrize(("of_seeds", "more"), [(0.7, "more --seeds than 2"), (0.3, "more --eval_rows")])
def test_what_would_narrow_the_intervals(of_seeds, more):
    found = outcome(LINES, ["a", "b"], None, None)
    assert advice(found) == "", "a difference was seen"
    found.comparisons["reward"][:] = [compared(0.0, -0.1, 0.3, of_seeds)]
    said = advice(found)
    assert "one of up to 0.2 could be" in said and f"{of_seeds:.0%} of what" in said and f", so {more} would" in said


def test_tables():
    found = outcome(LINES, ["a", "b", "c"], None, None)
    rows = contestant_rows(found, short=True)
    assert [row[0] for row in rows] == ["start", "b", "c", "a"]
    assert rows[1] == ["b", "0.9", "2.01", "2", "1.5", "6", "2 s"] and rows[0][1:4] == ["0.1", "3", "0"]
    assert comparison_rows(found, "reward")[0] == ["a − b", "−0.4", "−0.4 to −0.4", "b is better"]


def test_bands_go_from_the_lowest_seed_to_the_highest_at_the_first_ones_checks():
    other = line("b", 1, 1.7, 2.0, steps=8)
    x, y = over_seeds([line("b", 0, 0.9, 2.0), other], "reward", "steps")
    assert x.tolist() == [0, 4] and y == pytest.approx(np.array([[0.1, 0.9], [0.1, 0.9]]))  # half way to 1.7
    svg = curves("reward", {"b": [line("b", 0, 0.5, 2.0), line("b", 1, 0.9, 2.0)]}, "reward", "steps")
    assert "band" in svg


def test_the_frontier_has_higher_rewards_further_up_and_the_start_to_the_left():
    runs = {"low": [line("low", 0, 0.2, 2.0)], "high": [line("high", 0, 0.9, 2.0)]}
    dots = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', frontier(runs, "reward"))
    (x_low, y_low), (x_high, y_high) = ((float(x), float(y)) for x, y in dots)
    assert x_low == x_high and y_high < y_low
    ways = re.findall(r'class="line \S+" d="M([\d.]+)[ ,].*?[ L]([\d.]+)[ ,][\d.]+"', frontier(runs, "reward"))
    assert len(ways) == 2 and all(float(start) < float(end) == x_low for start, end in ways)


def test_an_interval_is_green_where_the_first_is_better():
    shades = {}
    for metric in ("reward", "nll", "kl"):
        for one in (compared(0.2, 0.1, 0.3), compared(-0.2, -0.3, -0.1), compared(0.0, -0.1, 0.1)):
            (shade,) = re.findall(r'class="interval (s\d)"', intervals(metric, [one]))
            shades.setdefault(metric, []).append(shade)
    assert shades == {"reward": ["s2", "s1", "s9"], "nll": ["s1", "s2", "s9"], "kl": ["s0", "s0", "s9"]}


def test_a_table_of_every_metric_fits_a_screen_of_80_columns():
    """No word and no number of it is folded."""
    row = ["start", "0.843", "0.921", "0.018", "0.758", "3.15", "0.285", "5.07", "0.455", "126", "4.3 s"]
    console = Console(width=80, file=io.StringIO(), force_terminal=False, color_system=None)
    short = [one.short for one in METRICS.values()]
    console.print(on_screen("means", ["", *short, "own loss", "steps", "time"], [row], padding=NARROW))
    heads, _, found = console.file.getvalue().removeprefix("means").partition("─" * 70)
    assert sorted(heads.split()) == sorted([*short, "own", "loss", "steps", "time"])
    assert found.strip("─ \n").split() == " ".join(row).split()
