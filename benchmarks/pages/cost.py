"""Where a run's time and memory went, beside what `logratio plan` predicts of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from logratio.benchmarks.memory.gpus import known_as
from logratio.benchmarks.planned import Options, not_modelled, options_of, planned
from logratio.trainers.errors import UserError

from .runs import Run, section
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
    why_not = unplanned(run)
    if why_not or peak is None or column is None:
        return Cost(lines, why_not=why_not or "the log lacks step_ms or peak_mem_mib")
    try:
        answer = planned(plan_options(run))
    except UserError as error:
        return Cost(lines, why_not=str(error))
    told = []
    for what, unit, measured, predicted in (
        ("peak memory", "MiB", float(np.nanmax(peak.values)), answer["predicted_peak_mem_mib"]),
        ("median step", "ms", float(np.nanmedian(column.values)), answer["predicted_step_ms"]),
    ):
        ratio = f"{measured / predicted:.2f}"
        told.append((what, f"{number(measured)} {unit}", f"{number(predicted)} {unit}", ratio))
    parts = [(name, mib) for name, mib in answer["parts_mib"].items() if mib]
    return Cost(lines, told, sorted(parts, key=lambda part: -part[1]))


def unplanned(run: Run) -> str:
    """Why the plan does not apply; empty where it does."""
    device = run.about.get("device")
    if device is None:
        return "run_config.json does not say on which device it ran"
    if device == "cpu":
        return "the plan is of a GPU's memory, and this ran on a CPU"
    if known_as(str(device), gpu_bytes(run)) is None:
        return f"the plan knows no {device}"
    if run.about.get("num_processes") != 1:
        return "the plan is of one process"
    if left_out := not_modelled(run.config):
        return left_out[0]
    for name in ("micro_batch_tokens", "batch_size"):
        if not isinstance(found := run.option("train", name), int):
            return f"run_config.json has no number of {name}, but {found}"
    if not isinstance(section(run.card, "train").get("prompt_tokens"), int | float):
        return "data_card.json does not say how long the rows are"
    return ""


def gpu_bytes(run: Run) -> int:
    return int(float(run.about.get("device_mem_mib") or 0) * 2**20)


def plan_options(run: Run) -> Options:
    """What `logratio plan` would be asked, with the mean lengths of this run's data."""
    gpu, train = known_as(str(run.about["device"]), gpu_bytes(run)), section(run.card, "train")
    lengths = run.columns.get("completions/mean_length")
    completion = train.get("completion_tokens") if lengths is None else float(np.nanmean(lengths.values))
    return options_of(
        run.config,
        gpu=str(gpu),
        prompt_tokens=max(1, round(train["prompt_tokens"])),
        completion_tokens=max(1, round(completion or 1)),
    )
