"""`logratio bench SUITE`: measures ours beside TRL and Liger-Kernel, a JSON line for each contestant of each case.

    quick   two minutes on a CPU: a small head, tiny steps of every method, one step of SmolLM2-135M's shape
    head    the LM head alone, forward and backward
    step    one optimizer step of every method, whole, with LoRA and with QLoRA
    scale   how a step grows with sequence length, batch, vocabulary and group size
    host    what Python costs: steps of a deep, narrow model on one thread of a CPU
    rollout completions, and whole GRPO steps, beside TRL's trainer and transformers' generate
    learning what GRPO learns of the embedded task with three seeds, and how soon, beside TRL's trainer
    data    rows to tokens to micro-batches, and a process's memory (--data_rows, --no-data_texts)
    all     head, step and scale

    RUN.yaml   a step of your own run: `logratio bench RUN.yaml --help`

Lines are appended to the results as cases end, and what has a line already is left out, so that a run may be cut at any
time (`--budget_s` cuts it between two cases) and gone on with. Status 1 where a case failed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any, get_args

import torch
import tyro
from rich.console import Console

from logratio.trainers.errors import UserError, first_line

from .measure import divergence, head, learning, rollout
from .measure.clock import free_memory
from .measure.steps import step
from .measure.steps.contestants import LEARNING_RATE
from .measure.steps.step_cases import FIRST, StepCase
from .own import command
from .progress import Progress
from .reporting.records import Records, certificate, device_name
from .suites import Job, Options, Suite, jobs_of


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a run of your own (RUN.yaml), or head and steps beside TRL and Liger-Kernel."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if command.names_a_run(argv, get_args(Suite)):
        return command.main(argv)
    options = tyro.cli(Options, args=argv, prog="logratio bench", description=__doc__)
    if threads := options.threads or (1 if options.suite == "learning" else None):
        torch.set_num_threads(threads)
    device = chosen_device("cpu" if options.suite in ("host", "learning", "data") else options.device)
    of_head = {**head.CONTESTANTS, **divergence.contestants(0.0)}
    names = (*of_head, *step.CONTESTANTS, *rollout.CONTESTANTS, *learning.CONTESTANTS)
    known = {word for name in names for word in (name, name.split(" ")[0])}
    if unknown := sorted(set(options.contestants) - known):
        raise UserError(f"--contestants: no {' or '.join(unknown)}; there are {', '.join(sorted(known))}")
    only = options.only or [""]
    jobs = [job for job in jobs_of(options, device) if any(part in job.case.case for part in only)]
    jobs.sort(key=lambda job: rank(job.case.case))
    if not jobs:
        raise UserError(f"no case of suite {options.suite} has a name with {' or '.join(options.only)} in it")
    if options.dry_run:
        print(*(job.case.case for job in jobs), sep="\n")
        return 0
    return measure(jobs, options, device)


def chosen_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device("cuda", 0) if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def rank(case: str) -> int:
    """Its place in the order of `FIRST`; behind it, all alike."""
    return next((i for i, start in enumerate(FIRST) if case.startswith(start)), len(FIRST))


def measure(jobs: Sequence[Job], options: Options, device: torch.device) -> int:
    """Run what has no line yet, one case after the other; 1 where one failed."""
    started = time.perf_counter()
    file = f"{device_name(device).lower().replace(' ', '-')}.jsonl"
    records = Records(options.results / file, fresh=options.fresh)
    # what failed, or did not end, comes last: tried first, again and again, it would keep a run from the rest
    jobs = sorted(jobs, key=lambda job: (job.suite, job.case.case) in records.failed)
    failed = left = 0
    with Progress(Console(), "bench", len(jobs)) as progress:
        for number, job in enumerate(jobs, 1):
            stub = record_of(job, options, device)
            able = [name for name in job.names if not job.why_not(name)]
            heading = f"{number}/{len(jobs)} {job.case.case}"
            if able and all(records.has(stub | {"contestant": name}) for name in able):
                progress.step(f"{heading}: measured already")
                continue
            if options.budget_s is not None and time.perf_counter() - started > options.budget_s:
                left += 1
                progress.step()
                continue
            progress.begin(job.case.case)
            progress.say(heading)
            begun = time.perf_counter()
            with records.beginning(job.suite, job.case.case):
                found = attempted(job)
            for name, figures in found.items():
                records.add(stub | {"contestant": name} | {k: finite(v) for k, v in figures.items()})
                failed += figures["status"] == "failed"
                progress.say(f"    {name} {summary(figures)}")
            progress.step(f"    {time.perf_counter() - begun:.0f} s")
    if left:
        print(f"{left} cases are left; the same command goes on with them")
    print(f"results in {records.path}")
    return 1 if failed else 0


def attempted(job: Job) -> dict[str, dict[str, Any]]:
    """The figures; where the case itself cannot be built, the same status for every contestant."""
    try:
        return job.run()
    except torch.OutOfMemoryError as error:
        row = {"status": "oom", "error": first_line(error)}
    except Exception as error:  # the next case may do better; this one is recorded
        row = {"status": "failed", "error": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        free_memory()
    return {name: dict(row) for name in job.names}


def record_of(job: Job, options: Options, device: torch.device) -> dict[str, Any]:
    """What all contestants' lines of a case share."""
    settings = {"seed": options.seed, "repeats": options.repeats}
    if isinstance(job.case, StepCase):
        settings |= job.case.settings() | {"optimizer": "adamw_torch_fused", "learning_rate": LEARNING_RATE}
    return {
        "suite": job.suite,
        "case": job.case.case,
        "contestant": "",
        "gpu": device_name(device),
        **job.case.fields(),
        "certificate": certificate(device, settings),
    }


def finite(value: Any) -> Any:
    """A figure that is no number becomes None; JSON has none."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(figures: dict[str, Any]) -> str:
    """One line of what was found."""
    if figures["status"] != "ok":
        return f"{figures['status']}: {figures['error']}"
    if "read_examples_per_s" in figures:
        return ", ".join(
            f"{figures[name]:.0f} {unit}"
            for name, unit in (
                ("rows_per_s", "rows/s tokenized"),
                ("packed_examples_per_s", "examples/s read and packed"),
                ("read_examples_per_s", "examples/s read"),
                ("peak_rss_mib", "MiB resident"),
            )
            if figures[name] is not None
        )
    if "accuracy" in figures:
        return f"{figures['accuracy']:.3f} ± {figures['accuracy_se']:.3f} right, {figures['cpu_s']:.0f} s of CPU time"
    parts = [f"{figures['rollout_ms_p50']:.1f} ms of rollouts"] if "rollout_ms_p50" in figures else []
    if "token_ms_p50" in figures:
        parts.append(f"{figures['token_ms_p50']:.2f} ms a token")
    time_ms = figures.get("time_ms_p50", figures.get("step_ms_p50"))
    if time_ms is not None:
        parts.append(f"{time_ms:.1f} ms")
    if figures.get("peak_mem_mib") is not None:
        parts.append(f"{figures['peak_mem_mib']:.0f} MiB")
    if figures.get("grad_rel_err") is not None:
        parts.append(f"gradient differs by {figures['grad_rel_err']:.1e}")
    return ", ".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
