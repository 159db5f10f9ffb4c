"""`logratio bench SUITE`: measures ours beside TRL and Liger-Kernel, a JSON line for each contestant of each case.

    quick   two minutes on a CPU: a small head, tiny steps of every method, one step of SmolLM2-135M's shape
    head    the LM head alone, forward and backward
    step    one optimizer step of every method, whole, with LoRA and with QLoRA
    scale   how a step grows with sequence length, batch, vocabulary and group size
    host    what Python costs: steps of a deep, narrow model on one thread of a CPU
    rollout completions, and whole GRPO steps, beside TRL's trainer and transformers' generate
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import tyro
from rich.console import Console

from logratio.trainers.errors import UserError, first_line

from .measure import data, head, host, rollout, step
from .measure.clock import free_memory
from .measure.contestants import LEARNING_RATE
from .measure.data import DataCase
from .measure.head import HeadCase
from .measure.rollout import RolloutCase
from .measure.step_cases import FIRST, StepCase, cpu_cases, gpu_cases, quick_cases, scale_cases
from .own import command
from .progress import Progress
from .reporting.records import Records, certificate, device_name

HEADS = {
    "Qwen2.5-0.5B": (896, 151936, 8192),
    "Llama-3.1-8B": (4096, 128256, 8192),
    "Qwen2.5-3B": (2048, 151936, 8192),
    "RL-Kernel's": (2048, 131072, 4096),
}
"""model -> hidden size, vocabulary, tokens; the last in the size that github.com/RL-Align/RL-Kernel publishes."""
SMALL_HEADS = {"SmolLM2-135M": (576, 49152, 1024)}

Suite = Literal["quick", "head", "step", "scale", "host", "rollout", "data", "all"]


@dataclass
class Options:
    """What to measure, and where to write it."""

    suite: tyro.conf.Positional[Suite]
    """Which cases."""
    results: Path = Path("benchmarks/results")
    """Folder of the JSON lines."""
    only: list[str] = field(default_factory=list)
    """Only cases whose names contain one of these, such as dpo-lora or Llama-3.1-8B-ultrafeedback."""
    contestants: list[str] = field(default_factory=list)
    """Only these: logratio, trl, trl+liger, of the head also eager, liger, torch, or one by its whole name."""
    repeats: int = 5
    """Rounds that are timed."""
    seed: int = 0
    """Of weights and tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda where there is one."""
    truth: bool = True
    """Hold the steps' log-probs and gradients against float64, of models of up to two billion parameters."""
    threads: int | None = None
    """Of torch on a CPU (default: its own choice)."""
    budget_s: float | None = None
    """Begin no case after so many seconds."""
    fresh: bool = False
    """Measure again what has been measured."""
    data_rows: int = 2000
    """Of the suite data: rows of its file."""
    data_processes: int = 1
    """Of the suite data: processes that tokenize."""
    data_texts: bool = True
    """Of the suite data: begin with texts, or with a table of ids."""
    dry_run: bool = False
    """Print the cases' names and stop."""


class Job(NamedTuple):
    """A case, its contestants, and what measures them: {contestant: status and figures}."""

    suite: str
    case: HeadCase | StepCase | RolloutCase | DataCase
    names: list[str]
    run: Callable[[], dict[str, dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a run of your own (RUN.yaml), or head and steps beside TRL and Liger-Kernel."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if command.names_a_run(argv, get_args(Suite)):
        return command.main(argv)
    options = tyro.cli(Options, args=argv, prog="logratio bench", description=__doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = chosen_device("cpu" if options.suite in ("host", "data") else options.device)
    names = (*head.CONTESTANTS, *step.CONTESTANTS, *rollout.CONTESTANTS)
    known = {word for name in names for word in (name, name.split(" ")[0])}
    if unknown := sorted(set(options.contestants) - known):
        raise UserError(f"--contestants: no {' or '.join(unknown)}; there are {', '.join(sorted(known))}")
    jobs = [job for job in jobs_of(options, device) if wanted(job, options.only)]
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


def asked(names: Iterable[str], options: Options) -> list[str]:
    """Those of a case's contestants that are to be measured, by their names or the first words of these."""
    return [n for n in names if not options.contestants or {n, n.split(" ")[0]} & set(options.contestants)]


def wanted(job: Job, only: Sequence[str]) -> bool:
    return not only or any(part in job.case.case for part in only)


def jobs_of(options: Options, device: torch.device) -> Iterator[Job]:
    """The suite's cases; on a CPU those that one can wait for."""
    gpu = device.type == "cuda"
    dtype = "bfloat16" if gpu else "float32"
    suites = ("head", "step", "scale") if options.suite == "all" else (options.suite,)
    if "head" in suites:
        for name, (hidden, vocab, tokens) in (HEADS if gpu else SMALL_HEADS).items():
            for trainable in (False, True):
                yield head_job(HeadCase(name, hidden, vocab, tokens, dtype, trainable), options, device)
    if "quick" in suites:
        yield head_job(HeadCase("tiny", 128, 8192, 512, "float32", False), options, device)
        for case in quick_cases():
            yield step_job("step", case, options, device)
    if "step" in suites:
        for case in gpu_cases() if gpu else cpu_cases():
            yield step_job("step", case, options, device)
    if "host" in suites:
        for case in host.cases():
            yield step_job("host", case, options, device)
    if "rollout" in suites:
        for rollouts in rollout.cases(gpu):
            yield rollout_job(rollouts, options, device)
    if "data" in suites:
        data_case = DataCase(options.data_rows, processes=options.data_processes, texts=options.data_texts)
        names = asked(data.CONTESTANTS, options)
        yield Job("data", data_case, names, lambda: data.run(data_case, seed=options.seed))
    if "scale" in suites:
        for case in scale_cases(gpu):
            yield step_job("scale", case, options, device)


def head_job(case: HeadCase, options: Options, device: torch.device) -> Job:
    only = asked(head.CONTESTANTS, options)
    return Job(
        "head", case, only, lambda: head.run(case, device, repeats=options.repeats, seed=options.seed, only=only)
    )


def step_job(suite: str, case: StepCase, options: Options, device: torch.device) -> Job:
    only = asked(step.CONTESTANTS, options)
    shared: dict[str, Any] = {"repeats": options.repeats, "seed": options.seed, "only": only}
    if suite == "host":
        return Job(suite, case, only, lambda: host.run(case, device, **shared))
    return Job(suite, case, only, lambda: step.run(case, device, with_truth=options.truth, **shared))


def rollout_job(case: RolloutCase, options: Options, device: torch.device) -> Job:
    only = asked(rollout.CONTESTANTS, options)
    return Job(
        "rollout",
        case,
        only,
        lambda: rollout.run(case, device, repeats=options.repeats, seed=options.seed, only=only),
    )


def measure(jobs: Sequence[Job], options: Options, device: torch.device) -> int:
    """Run what has no line yet, one case after the other; 1 where one failed."""
    started = time.perf_counter()
    records = Records(options.results / f"{slug(device)}.jsonl", fresh=options.fresh)
    # what failed, or did not end, comes last: tried first, again and again, it would keep a run from the rest
    jobs = sorted(jobs, key=lambda job: (job.suite, job.case.case) in records.failed)
    failed = left = 0
    with Progress(Console(), "bench", len(jobs)) as progress:
        for number, job in enumerate(jobs, 1):
            stub = record_of(job, options, device)
            able = [name for name in job.names if not why_not(job, name, device)]
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


def why_not(job: Job, name: str, device: torch.device) -> str | None:
    """Why a contestant cannot run here, or None."""
    if isinstance(job.case, DataCase | RolloutCase):
        return None
    return (head if isinstance(job.case, HeadCase) else step).why_not(name, device)


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


def slug(device: torch.device) -> str:
    return device_name(device).lower().replace(" ", "-")


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
    parts = [f"{figures['rollout_ms_p50']:.1f} ms of rollouts"] if "rollout_ms_p50" in figures else []
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
