"""The page of a comparison: one HTML file with nothing outside it, in the style of `logratio report`'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..pages.page import HERE as PAGES
from ..pages.page import css, mark, template
from ..pages.svg import Drawing, colour_of
from . import told
from .draw import curves, frontier, intervals
from .outcome import Outcome, advice, summary
from .running import Budget
from .scores import METRICS

MAKER = "logratio compare"


def rendered(
    found: Outcome, specs: Mapping[str, str], dataset: str, budget: Budget, lines: Sequence[Mapping[str, Any]]
) -> str:
    """The HTML. Whatever comes from the user is escaped by the template."""
    enough = len(found.names) > 1
    born = lines[0]["certificate"] if lines else {"command": MAKER, "versions": {}, "cpu": "", "device": ""}
    order = found.ordered if enough else []
    front = None
    if "kl" in order:
        note = "each way from the start, the mean over seeds; dots: the end of each seed; up and left is better"
        front = Drawing(f"{METRICS[found.metric].words} against KL", note, frontier(found.runs, found.metric))
    return template(Path(__file__).with_name("compare.html.j2")).render(
        mark=mark(MAKER),
        css=css(),
        js=Markup((PAGES / "page.js").read_text()),
        title=" · ".join(found.names) if len(found.names) <= 3 else f"{len(found.names)} losses compared",
        dataset=dataset,
        budget=budget,
        seeds=max((len(runs) for runs in found.runs.values()), default=0),
        device=born["cpu"] if born["device"] == "cpu" else born["device"],
        summary=summary(found),
        advice=advice(found),
        failed=found.failed,
        keys=[(colour_of(at), name, specs[name]) for at, name in enumerate(found.runs)],
        columns=told.columns(found) if enough else [],
        rows=told.contestant_rows(found) if enough else [],
        frontier=front,
        differences=[difference(found, name) for name in order],
        tables=[(METRICS[name].words, told.comparison_rows(found, name)) for name in order],
        curves=[
            Drawing(one.words, one.note, curves(one.words, found.runs, name, budget.unit))
            for name, one in ((name, METRICS[name]) for name in order)
        ],
        versions=born["versions"],
        command=born["command"],
    )


def difference(found: Outcome, metric: str) -> Drawing:
    note = f"{METRICS[metric].note}; {told.together(found, metric)}"
    return Drawing(f"Differences in {METRICS[metric].words}", note, intervals(metric, found.comparisons[metric]))
