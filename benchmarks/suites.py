"""What `logratio bench SUITE` is asked, and the cases that each suite has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro

from .measure import data, divergence, head, learning, rollout, rollout_case
from .measure.data import DataCase
from .measure.head import HeadCase
from .measure.learning import LearningCase
from .measure.rollout_case import RolloutCase
from .measure.steps import host, step
from .measure.steps.step_cases import StepCase, cpu_cases, gpu_cases, published_cases, quick_cases, scale_cases

HEADS = {
    "Qwen2.5-0.5B": (896, 151936, 8192),
    "Llama-3.1-8B": (4096, 128256, 8192),
    "Qwen2.5-3B": (2048, 151936, 8192),
    "RL-Kernel's": (2048, 131072, 4096),
}
"""model -> hidden size, vocabulary, tokens; the last in the size that github.com/RL-Align/RL-Kernel publishes."""
SMALL_HEADS = {"SmolLM2-135M": (576, 49152, 1024)}
BETAS = (0.0, 0.5)
"""Of the divergences from a teacher: the forward one, and GKD's default."""

Suite = Literal["quick", "head", "step", "scale", "host", "rollout", "learning", "data", "all"]


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
    """Of weights and tokens; of the suite learning the first of three."""
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
    case: HeadCase | StepCase | RolloutCase | LearningCase | DataCase
    names: list[str]
    run: Callable[[], dict[str, dict[str, Any]]]
    why_not: Callable[[str], str | None] = lambda name: None
    """Why a contestant cannot run here, or None."""


def jobs_of(options: Options, device: torch.device) -> Iterator[Job]:
    """The suite's cases; on a CPU those that one can wait for."""
    gpu = device.type == "cuda"
    dtype = "bfloat16" if gpu else "float32"
    suites = ("head", "step", "scale") if options.suite == "all" else (options.suite,)
    if "head" in suites:
        for name, (hidden, vocab, tokens) in (HEADS if gpu else SMALL_HEADS).items():
            for trainable in (False, True):
                yield head_job(HeadCase(name, hidden, vocab, tokens, dtype, trainable), options, device)
            for beta in BETAS:
                yield head_job(HeadCase(name, hidden, vocab, tokens, dtype, False, beta), options, device)
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
        turns: dict[str, Any] = {"device": device, "repeats": options.repeats, "seed": options.seed}
        for rollouts in rollout_case.cases(gpu):
            only = asked(rollout.CONTESTANTS, options)
            yield Job("rollout", rollouts, only, partial(rollout.run, rollouts, only=only, **turns))
    if "learning" in suites:
        for learned in learning.cases(options.seed):
            only = asked(learning.CONTESTANTS, options)
            yield Job("learning", learned, only, partial(learning.run, learned, only=only))
    if "data" in suites:
        data_case = DataCase(options.data_rows, processes=options.data_processes, texts=options.data_texts)
        yield Job("data", data_case, asked(data.CONTESTANTS, options), partial(data.run, data_case, seed=options.seed))
    if "scale" in suites:
        for case in [*(published_cases() if gpu else ()), *scale_cases(gpu)]:
            yield step_job("scale", case, options, device)


def head_job(case: HeadCase, options: Options, device: torch.device) -> Job:
    known = head.CONTESTANTS if case.beta is None else divergence.contestants(case.beta)
    only = {name: known[name] for name in asked(known, options)}
    shared: dict[str, Any] = {"exact": known["logratio (two_gemm)"], "repeats": options.repeats, "seed": options.seed}
    why_not = lambda name: head.why_not(known[name], device)  # noqa: E731
    return Job("head", case, list(only), partial(head.run, case, device, only, **shared), why_not)


def step_job(suite: str, case: StepCase, options: Options, device: torch.device) -> Job:
    only = asked(step.CONTESTANTS, options)
    shared: dict[str, Any] = {"repeats": options.repeats, "seed": options.seed, "only": only}
    run = host.run if suite == "host" else partial(step.run, with_truth=options.truth)
    return Job(suite, case, only, partial(run, case, device, **shared), partial(step.why_not, device=device))


def asked(names: Iterable[str], options: Options) -> list[str]:
    """Those of a case's contestants that are to be measured, by their names or the first words of these."""
    return [n for n in names if not options.contestants or {n, n.split(" ")[0]} & set(options.contestants)]
