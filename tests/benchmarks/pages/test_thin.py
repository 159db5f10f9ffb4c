"""Few points that show what many do: every extreme stays, gaps stay, and a page of long runs is small."""

from __future__ import annotations

import json
import math
import re
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logratio.benchmarks.pages.page import rendered
from logratio.benchmarks.pages.runs import Column, Run, read_run
from logratio.benchmarks.pages.svg import Scale, points_for
from logratio.benchmarks.pages.thin import POINTS, decades, means, thinned, ticks
from logratio.benchmarks.pages.words import duration, number, tick, tick_labels

from ._folders import line, options

NAN = math.nan


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6) | st.just(NAN) | st.just(math.inf), min_size=1, max_size=300), st.integers(4, 20))
def test_ends_and_the_extremes_of_every_stretch_stay(values, points):
    steps = list(range(5, 5 + len(values)))
    x, y = thinned(steps, values, points)
    assert (x[0], x[-1]) == (steps[0], steps[-1]) and (np.diff(x) > 0).all()
    given_ = {step: value for step, value in zip(steps, values, strict=True)}
    for step, value in zip(x, y, strict=True):
        assert value == given_[step] if math.isfinite(given_[step]) else math.isnan(value)
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        assert (np.nanmin(y), np.nanmax(y)) == (min(finite), max(finite))
    assert np.isnan(y).any() == (len(finite) < len(values))
    assert len(x) <= max(points, len(values) if len(values) <= points else 0, 2) * 1.5


def test_a_gap_of_one_value_stays_a_gap():
    values = [NAN if step == 7 else float(step) for step in range(30)]
    x, _ = thinned(range(30), values, 10)
    assert 7 in x and len(x) < 12


def test_each_spike_of_a_long_curve_stays_and_so_do_its_neighbours_ranges():
    rng = np.random.default_rng(0)
    values = rng.normal(size=100_000)
    spikes = rng.choice(100_000, 40, replace=False)
    values[spikes[:20]] += 100
    values[spikes[20:]] -= 100
    x, y = thinned(np.arange(100_000), values)
    assert len(x) <= POINTS
    kept = set(x.astype(int).tolist())
    stretch = 100_000 // (POINTS // 2 - 1)
    for at in spikes.tolist():  # itself, or a higher one beside it in its stretch
        near = [i for i in kept if abs(i - at) <= stretch and values[i] * np.sign(values[at]) > 90]
        assert near, at


def test_the_line_of_means_is_the_mean_of_a_window():
    values = np.arange(200.0) ** 2
    values[50:80] = NAN
    x, y = means(range(200), values)
    for at, mean in zip(x.astype(int), y, strict=True):
        window = values[max(at - 5, 0) : at + 6]
        expected = np.nanmean(window) if np.isfinite(window).any() else NAN
        np.testing.assert_allclose(mean, expected)
    assert np.isnan(y).any()
    assert means(range(60), values[:60]) is None
    _, geometric = means(range(100), np.tile([1.0, 100.0], 50), log=True)
    np.testing.assert_allclose(geometric[20:-20], 10, rtol=0.6)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 4, [-2, 0, 2, 4]), (0, 150, [0, 50, 100, 150]), (3, 3, [3])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high, 4) == pytest.approx(expected)


def test_ticks_of_a_logarithmic_axis():
    assert decades(0.05, 200) == pytest.approx([0.1, 1, 10, 100])
    assert decades(3, 60) == pytest.approx([5, 10, 20, 50])
    assert len(decades(1e-12, 1e12)) <= 5
    assert Scale(1, 100, 0, 10, log=True)(np.array([1.0, 10.0, 100.0])) == pytest.approx([0, 5, 10])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"), (0.5, "0.5"), (1234.5678, "1,235"), (0.00012346, "0.0001235"), (1.5e-7, "1.5e-7"),
        (-3.14159, "-3.142"),
        (1e15, "1e15"), (NAN, "not a number"), (math.inf, "∞"), (None, "–"), (123456789, "123,456,789"), (700.0, "700"),
    ],
)  # fmt: skip
def test_numbers_are_written_with_four_digits(value, expected):
    assert number(value) == expected


def test_times_and_ticks_in_words():
    assert [duration(x) for x in (0.05, 41, 725, 12_000)] == ["0.05 s", "41 s", "12 min 5 s", "3 h 20 min"]
    assert [tick(x) for x in (250, 40_000, 1_200_000, 5e-5)] == ["250", "40k", "1.2M", "5e-5"]
    assert tick_labels([5.065, 5.07, 5.075, 5.08]) == ["5.065", "5.07", "5.075", "5.08"], "no two alike"
    assert tick_labels([0.0, 0.5, 1.0]) == ["0", "0.5", "1"] and tick_labels([]) == []
    assert tick_labels([10_010.0, 10_020.0]) == ["10.01k", "10.02k"]


def test_ten_runs_of_a_hundred_thousand_steps_are_a_small_page():
    rng = np.random.default_rng(0)
    steps = array("q", range(1, 100_001))
    noise = [array("d", rng.normal(size=100_000).tobytes()) for _ in range(4)]
    names = [name for name in line(1) if name not in ("step", "hash")] + [f"rewards/{i}/mean" for i in range(28)]
    runs = [
        Run(Path(f"run-{i}"), f"run-{i}", options(), {n: Column(steps, noise[i % 4]) for n in names}, 100_000, 100_000)
        for i in range(10)
    ]
    text = rendered(runs)
    assert len(text.encode()) < 3_000_000
    longest = max(re.findall(r' d="(.*?)"', text), key=len)
    assert 100 < longest.count("L") <= points_for(10 * len(names))


def test_a_long_log_is_read_whole_and_its_spike_is_on_the_page(tmp_path):
    folder = tmp_path / "long"
    folder.mkdir()
    (folder / "run_config.json").write_text(json.dumps(options()))
    rows = (json.dumps({"step": n, "loss": 50.0 if n == 54_321 else 1.0, "grad_norm": 1.0}) for n in range(1, 100_001))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    run = read_run(folder, "long")
    assert (run.num_steps, run.last_step, run.last("loss")) == (100_000, 100_000, 1.0)
    text = rendered([run])
    assert len(text.encode()) < 300_000
    frame = re.search(
        r'aria-label="Loss by step" data-x="(\S+) (\S+) (\S+) (\S+)" data-y="(\S+) (\S+) (\S+) (\S+) ', text
    )
    x0, x1, left, right, y0, y1, bottom, top = map(float, frame.groups())
    x = left + (54_321 - x0) / (x1 - x0) * (right - left)
    y = bottom + (50 - y0) / (y1 - y0) * (top - bottom)
    assert f"L{x:.1f} {y:.2f}" in text
