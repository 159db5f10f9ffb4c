"""The page of a measured run: one HTML file with nothing outside it, in the style of `logratio report`'s."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from ..pages.options import options, versions
from ..pages.page import css, mark, template
from ..pages.runs import Run
from ..pages.svg import Drawing
from ..pages.words import duration, number
from . import told
from .draw import Bar, Point, bars, steps
from .measuring import OURS, TRL, Measured
from .spent import as_rows

HERE = Path(__file__).parent
MAKER = "logratio bench"
NAME = "bench.html"


def rendered(found: Measured, name: str, certificate: dict[str, Any]) -> str:
    """The HTML. Whatever comes from the run is escaped by the template."""
    config = json.loads(json.dumps({**found.subject.run.config.as_dict(), "about": certificate}))
    run = Run(Path(name), name, config, {}, 0, 0)
    measured = {name: row for name, row in found.rows.items() if row["status"] == "ok"}
    looked = found.budgets
    return template(HERE / "bench.html.j2").render(
        mark=mark(MAKER),
        css=css(),
        name=name,
        run=run,
        device=certificate["device"] if told.is_gpu(found) else certificate["cpu"],
        gpu=told.is_gpu(found),
        tiles=tiles(found),
        notes=list(dict.fromkeys(filter(None, [told.rollout_line(found), *found.subject.notes]))),
        verdict=told.verdict(found),
        advice=told.budget_lines(found),
        step=step_figures(found),
        columns=told.COLUMNS,
        lines=[told.line_of(who, row) for who, row in measured.items()],
        details=[detail(who, row, found) for who, row in measured.items()],
        memory=memory_figure(found),
        memory_rows=[
            (part, told.mib(a), told.mib(b), f"{a / b:.2f}" if a and b else "–")
            for part, a, b in as_rows(found.memory, found.plan)
        ],
        plan=found.plan,
        plan_ms=sum((found.plan.step_ms or {}).values()),
        budgets=budget_figures(found),
        budget_rows=[
            (
                f"{one.tokens:,}",
                number(one.micro_batches, 3),
                f"{one.largest:,}",
                told.ms(one.step_ms),
                "–" if one.to_asked is None else f"{one.to_asked:.2f}",
                told.mib(one.memory_mib),
                told.outcome(one, found),
            )
            for one in (looked.budgets if looked else [])
        ],
        memory_name=told.GPU_MEMORY if told.is_gpu(found) else told.CPU_MEMORY,
        options=[option for option in options([run]) if option.told],
        versions=versions([run]),
        command=certificate["command"],
    )


def tiles(found: Measured) -> list[tuple[str, str]]:
    """What tells most."""
    row, trl = found.rows[OURS], found.rows.get(TRL, {})
    shown = [
        ("median step", f"{told.ms(row['step_ms_p50'])} ms"),
        ("tokens/s", number(row["tokens_per_s"], 3)),
        ("examples/s", number(row["examples_per_s"], 3)),
        ("the host's own time", f"{100 * row['host_share']:.0f} %"),
    ]
    if (kept := told.memory_of(row)) is not None:
        shown.insert(3, (told.GPU_MEMORY if told.is_gpu(found) else told.CPU_MEMORY, f"{told.mib(kept)} MiB"))
    if trl.get("status") == "ok":
        shown.append(("TRL's time / ours", f"{trl['time_to_ours']:.2f}"))
    if (looked := found.budgets) is not None and looked.fastest is not None:
        shown.append(("fastest micro_batch_tokens", f"{looked.fastest:,}"))
    if looked is not None and looked.largest is not None:
        shown.append(("largest that fits", f"{looked.largest:,}"))
    return shown


def barred(title: str, note: str, rows: list[Bar]) -> Drawing:
    return Drawing(title, note, bars(title, rows))


def step_figures(found: Measured) -> list[Drawing]:
    """A step of each contestant, and the parts of ours."""
    each = []
    for name, row in found.rows.items():
        if row["status"] == "ok":
            low, middle, high = (row[f"step_ms_{p}"] for p in ("p20", "p50", "p80"))
            each.append(Bar(name, middle, f"{told.ms(middle)} ms", {OURS: 0, TRL: 1}[name], low, high))
    note = "ms, the median; the line is from the 20th to the 80th percentile"
    figures = [barred("Time of a step", note, each)]
    if found.parts:
        parts = [Bar(name, value, f"{told.ms(value)} ms", 2) for name, value in found.parts.items()]
        said = "ms, with the device drained after each part, and so more than the step itself"
        figures.append(barred("Parts of our step", said, parts))
    if found.rollout_ms:
        step = found.rows[OURS]["step_ms_p50"]
        sampled = statistics.median(found.rollout_ms)
        both = [Bar("rollouts and rewards", sampled, duration(sampled / 1e3), 4)]
        both.append(Bar("the update", step, duration(step / 1e3), 0))
        figures.append(barred("Rollouts and update", "of one batch of prompts", both))
    return figures


def detail(name: str, row: dict[str, Any], found: Measured) -> tuple[str, str]:
    """(contestant, what its forward pass computes)."""
    said = [
        f"{row['num_padded_tokens']:,} tokens computed for the step's {row['num_tokens']:,}",
        f"{100 * row['padding']:.1f} % of them padding",
        f"attention {row['attention']}",
    ]
    if name == OURS:
        count = row["micro_batches"]
        said.insert(0, f"{number(count, 3)} micro-batch{'es' * (count != 1)} a step")
    else:
        what = "completions" if found.subject.grouped else "examples"
        said.insert(0, f"micro-batches of {row['micro_batch']} {what}")
    return name, ", ".join(said)


def memory_figure(found: Measured) -> Drawing:
    """Measured and planned, part by part."""
    rows = []
    for part, measured, planned in as_rows(found.memory, found.plan):
        if measured is not None:
            rows.append(Bar(part, measured, f"{told.mib(measured)} MiB", 0))
        if planned is not None:
            rows.append(Bar(f"{part}, planned", planned, f"{told.mib(planned)} MiB", 3))
    return barred("Memory of a step by part", "MiB", rows)


def budget_figures(found: Measured) -> list[Drawing]:
    """Time and memory over the budgets."""
    looked = found.budgets
    if looked is None:
        return []
    timed = [one for one in looked.budgets if one.step_ms is not None]
    figures = []
    if timed:
        points = [Point(f"{one.tokens:,}", one.step_ms or 0.0, one.tokens == looked.fastest) for one in timed]
        figures.append(
            Drawing("Time by budget", "ms of a step; the fastest is marked", steps("Time by budget", points))
        )
    known = [one for one in timed if one.memory_mib is not None]
    if known:
        points = [Point(f"{one.tokens:,}", one.memory_mib or 0.0, one.tokens == looked.largest) for one in known]
        name = told.GPU_MEMORY if told.is_gpu(found) else told.CPU_MEMORY
        figures.append(Drawing(f"{name.capitalize()} by budget", "MiB", steps("Memory by budget", points, 1)))
    return figures
