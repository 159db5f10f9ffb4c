"""What is said on a terminal: a line as each run ends, and the tables of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from ..pages.words import duration, number
from ..progress import say
from ..reporting.tables import on_screen
from .draw import signed
from .intervals import LEVEL, Estimate
from .outcome import Outcome, advice, summary, verdict
from .running import Job
from .scores import METRICS

NARROW = (0, 0, 0, 1)
"""Beside the cells of a table: its lines are long."""


def progress(job: Job, result: Mapping[str, Any]) -> str:
    """A run has ended."""
    head = f"{job.contestant}, seed {job.seed}"
    if result["status"] != "ok":
        return f"{head}: failed: {result['error']}"
    last = result["curve"][-1]
    said = [f"{name} {number(last[name], 3)}" for name in METRICS if name in last]
    return f"{head}: {', '.join(said)}; {result['steps']:,} steps, {duration(result['train_s'])} in them"


def interval(estimate: Estimate) -> str:
    return f"{number(estimate.mean, 3)} ({number(estimate.low, 3)} to {number(estimate.high, 3)})"


def figure(value: float, short: bool) -> str:
    """Three digits; for a screen no more than three of them behind the point."""
    return number(round(value, 3) if short else value, 3)


def contestant_rows(found: Outcome, *, short: bool = False) -> list[list[str]]:
    """The start, then each contestant, best first: the deciding metric (with its interval), and the others."""
    rest = found.ordered[1:]
    rows = [["start", *(figure(found.start[name], short) for name in found.ordered), "", "", ""]]
    for name in found.ranked:
        runs, means = found.runs[name], found.means[name]
        own = [run["own_loss"] for run in runs]
        rows.append(
            [
                name,
                figure(means[found.metric].mean, short) if short else interval(means[found.metric]),
                *(figure(means[other].mean, short) for other in rest),
                "–" if own[0] is None else figure(sum(own) / len(own), short),
                number(sum(run["steps"] for run in runs) / len(runs), 3),
                duration(sum(run["train_s"] for run in runs) / len(runs)),
            ]
        )
    return rows


def columns(found: Outcome, *, short: bool = False) -> list[str]:
    """Of `contestant_rows`."""
    shown = [METRICS[name] for name in found.ordered]
    return ["", *(one.short if short else one.words for one in shown), "own loss", "steps", "time"]


def comparison_rows(found: Outcome, metric: str) -> list[list[str]]:
    return [
        [
            f"{one.first} − {one.second}",
            signed(one.difference.mean),
            f"{signed(one.difference.low)} to {signed(one.difference.high)}",
            verdict(one, metric),
        ]
        for one in found.comparisons[metric]
    ]


def together(found: Outcome, metric: str) -> str:
    """What the intervals of a metric promise."""
    count = len(found.comparisons[metric])
    return f"{LEVEL:.0%} for all {count} of them together" if count > 1 else f"{LEVEL:.0%}"


def show(found: Outcome, console: Console) -> None:
    """Tables on a terminal."""
    if len(found.names) > 1:
        rows = contestant_rows(found, short=True)
        title = "means over seeds and held-out rows"
        console.print(on_screen(title, columns(found, short=True), rows, padding=NARROW))
        title = f"differences in {METRICS[found.metric].words}, {together(found, found.metric)}"
        heads, rows = ("", "difference", "interval", ""), comparison_rows(found, found.metric)
        console.print(on_screen(title, heads, rows, padding=NARROW))
    for line in filter(None, (summary(found), advice(found), *found.failed)):
        say(console, line)
