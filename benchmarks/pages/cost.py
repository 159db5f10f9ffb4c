"""Where a run's time and memory went, beside what `logratio plan` predicts of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from logratio.benchmarks.planned import plan_of_run
from logratio.trainers.errors import UserError

from .runs import Run
from .words import duration, number


@dataclass(frozen=True)
class Cost:
    """lines: what -> how much. planned: (what, measured, predicted, the one over the other); parts: of the predicted
    peak, in MiB. why_not: why there is no prediction."""

    lines: dict[str, str]
    planned: list[tuple[str, str, str, str]] = dataclasses.field(default_factory=list)
    parts: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    why_not: str = ""


def cost(run: Run) -> Cost:
    """Of the steps that the log has; what the time between them went into is not logged."""
    lines: dict[str, str] = {}
    if (column := run.known("step_ms")) is not None:
        ms = np.asarray(column.values)
        slowest = int(np.nanargmax(ms))
        lines |= {
            "in optimizer steps": duration(float(np.nansum(ms)) / 1e3),
            "median step": f"{number(float(np.nanmedian(ms)))} ms",
            "95 % of the steps within": f"{number(float(np.nanquantile(ms, 0.95)))} ms",
            "slowest step": f"{number(float(ms[slowest]))} ms (step {column.steps[slowest]:,})",
        }
    if (tokens := run.last("num_tokens")) is not None:
        lines["tokens"] = f"{tokens:,.0f}"
    if (speed := run.known("tokens_per_s")) is not None:
        lines["median speed"] = f"{number(float(np.nanmedian(speed.values)))} tokens/s"
    peak = run.known("peak_mem_mib")
    if peak is not None:
        kind = "process" if run.about.get("device", "cpu") == "cpu" else "GPU, allocated by torch"
        lines[f"peak memory ({kind})"] = f"{number(float(np.nanmax(peak.values)))} MiB"
    sampled = run.known("completions/mean_length")
    try:
        answer = plan_of_run(run.config, run.card, None if sampled is None else float(np.nanmean(sampled.values)))
    except UserError as error:
        return Cost(lines, why_not=str(error))
    if peak is None or column is None:
        return Cost(lines, why_not="the log lacks step_ms or peak_mem_mib")
    told = []
    for what, unit, measured, predicted in (
        ("peak memory", "MiB", float(np.nanmax(peak.values)), answer["predicted_peak_mem_mib"]),
        ("median step", "ms", float(np.nanmedian(column.values)), answer["predicted_step_ms"]),
    ):
        ratio = f"{measured / predicted:.2f}"
        told.append((what, f"{number(measured)} {unit}", f"{number(predicted)} {unit}", ratio))
    parts = [(name, mib) for name, mib in answer["parts_mib"].items() if mib]
    return Cost(lines, told, sorted(parts, key=lambda part: -part[1]))
