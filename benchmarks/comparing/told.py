"""What is said on a terminal: a line as each run ends, and the tables of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..pages.words import duration, number
from .draw import signed
from .intervals import LEVEL, Estimate
from .outcome import Outcome, advice, summary, verdict
from .running import Job

SHORT = {
    "reward": "reward",
    "greedy": "greedy",
    "exact": "exact",
    "accuracy": "order",
    "nll": "NLL",
    "kl": "KL",
    "length": "long",
}
"""On a terminal, where a line is short."""
WORDS = {
    "reward": "reward",
    "greedy": "reward, greedy",
    "exact": "exact",
    "accuracy": "pairs in order",
    "nll": "NLL of chosen",
    "kl": "KL",
    "length": "length",
}


def progress(job: Job, result: Mapping[str, Any]) -> str:
    """A run has ended."""
    head = f"{job.contestant}, seed {job.seed}"
    if result["status"] != "ok":
        return f"{head}: failed: {result['error']}"
    last = result["curve"][-1]
    said = [f"{name} {number(last[name], 3)}" for name in WORDS if name in last]
    return f"{head}: {', '.join(said)}; {result['steps']:,} steps, {duration(result['train_s'])} in them"


def interval(estimate: Estimate) -> str:
    return f"{number(estimate.mean, 3)} ({number(estimate.low, 3)} to {number(estimate.high, 3)})"


def figure(value: float, short: bool) -> str:
    """Three digits; for a screen no more than three of them behind the point."""
    return number(round(value, 3) if short else value, 3)


def contestant_rows(found: Outcome, *, short: bool = False) -> list[list[str]]:
    """The start, then each contestant, best first: the deciding metric (with its interval), and the others."""
    rest = [name for name in found.metrics if name != found.metric]
    rows = [["start", *(figure(found.start[name], short) for name in (found.metric, *rest)), "", "", ""]]
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


def columns(found: Outcome, words: Mapping[str, str] = WORDS) -> list[str]:
    """Of `contestant_rows`."""
    rest = [name for name in found.metrics if name != found.metric]
    return ["", *(words[name] for name in (found.metric, *rest)), "own loss", "steps", "time"]


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
    say = lambda text: console.print(text, markup=False, highlight=False)  # noqa: E731
    if len(found.names) > 1:
        rows = contestant_rows(found, short=True)
        console.print(table("means over seeds and held-out rows", columns(found, SHORT), rows))
        title = f"differences in {WORDS[found.metric]}, {together(found, found.metric)}"
        console.print(table(title, ("", "difference", "interval", ""), comparison_rows(found, found.metric)))
    for line in (summary(found), advice(found), *found.failed):
        if line:
            say(line)


def table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    shown = Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for at, name in enumerate(names):
        shown.add_column(name, justify="left" if at == 0 or not name else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(escape, row))
    return shown
