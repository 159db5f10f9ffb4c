"""`logratio profile CASE`: where the time of one optimizer step goes, of ours or of a peer.

    kernels        the kernels that take longest in sum, with their calls
    gpu_idle       share of the step in which no kernel runs
    host_ms        the step's time less what the host waits for the device: what Python and launches take
    step_ms        without the profiler, which slows the host down

On a CPU there are no kernels but torch's operators, each with the time that it takes itself, and host_ms is what lies
outside of them.

CASE is a name as `logratio bench step --dry_run` prints them. Writes JSON, and prints it as a table in Markdown.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from logratio.trainers.errors import UserError

from .bench import chosen_device
from .measure.clock import time_ms
from .measure.profiled import figures, figures_of_cpu, profiled_once
from .measure.steps import step
from .measure.steps.step_cases import StepCase, cpu_cases, gpu_cases, quick_cases
from .reporting.files import write
from .reporting.records import certificate


@dataclass
class Options:
    """Which step, and where to write."""

    case: tyro.conf.Positional[str]
    """Of the suite `step`, or on a CPU of `quick` as well."""
    contestant: Literal["logratio", "trl", "trl+liger"] = "logratio"
    """Whose step."""
    out: Path | None = None
    """A JSON file."""
    top: int = 10
    """Kernels, or operators, that are listed."""
    repeats: int = 3
    """Steps that are timed without the profiler."""
    seed: int = 0
    """Of weights and tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda where there is one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Where the time of one optimizer step goes: kernels, idle GPU, host."""
    options = tyro.cli(Options, args=argv, prog="logratio profile", description=__doc__)
    device = chosen_device(options.device)
    cases = {case.case: case for case in (gpu_cases() if device.type == "cuda" else [*cpu_cases(), *quick_cases()])}
    if options.case not in cases:
        raise UserError(f"no case {options.case}; there are {', '.join(cases)}")
    found = profiled(cases[options.case], options.contestant, device, options)
    print(table(found))
    if options.out is not None:
        write(options.out, (json.dumps(found, indent=1) + "\n").encode(), "--out")
    return 0


def profiled(case: StepCase, contestant: str, device: torch.device, options: Options) -> dict[str, Any]:
    """The figures of one step, after one that compiles and those that are timed."""
    model = step.build_of(case, device, options.seed)
    window = case.window(model.get_output_embeddings().weight.shape[0], options.seed)
    old = step.old_logps(case, model, [window], options.seed)
    with ExitStack() as stack:
        one = step.make(contestant, case, model, device, stack, old)
        work = step.step_of(one, [one.prepare(window)])
        for _ in range(2):
            work(0)
        times = [time_ms(lambda: work(0), device) for _ in range(options.repeats)]
        elapsed, events = profiled_once(lambda: work(0), device)
    settings = case.settings() | {"seed": options.seed, "repeats": options.repeats}
    told = {"case": case.case, "contestant": contestant, "step_ms": statistics.median(times), "profiled_ms": elapsed}
    told |= (figures if device.type == "cuda" else figures_of_cpu)(events, elapsed, options.top)
    return told | {"certificate": certificate(device, settings)}


def table(found: dict[str, Any]) -> str:
    """The figures in Markdown."""
    what = "kernel" if "kernels" in found else "operator"
    idle = f"GPU idle {found['gpu_idle']:.1%}, " if "gpu_idle" in found else ""
    head = (
        f"{found['case']}, {found['contestant']}: {found['step_ms']:.1f} ms a step; under the profiler "
        f"{found['profiled_ms']:.1f} ms, {idle}host {found['host_ms']:.1f} ms, {found['launches']} {what}s"
    )
    rows = [f"| {k['ms']:.2f} | {k['share']:.1%} | {k['calls']} | `{k['name'][:100]}` |" for k in found[f"{what}s"]]
    return "\n".join([head, "", f"| ms | share | calls | {what} |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    raise SystemExit(main())
