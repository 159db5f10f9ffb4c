"""All of it, in order: what the step takes alone, the other side beside it, and then other budgets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.nn.modules.dropout import _DropoutNd

from ..measure.clock import free_memory, interleaved, median_ratio, wait
from ..measure.profiled import host_share
from ..measure.steps.contestants import Contestant
from ..measure.steps.ledger import gradient
from ..measure.steps.step import Figures, agreeing, attempt, memory, on_trial, rates, step_of, told
from .budgets import Found, search
from .ours import Ours, Turns, settle
from .spent import Reckoned, measured_parts, reckoned
from .subject import Subject
from .theirs import OwnCase, make_trl

OURS, TRL = "logratio", "trl"


@dataclass
class Measured:
    """rows: {contestant: status and figures}. memory: MiB of each part. plan: the same, reckoned. parts: ms of a step's
    parts. budgets: None where they were not looked for."""

    subject: Subject
    case: OwnCase
    rows: dict[str, Figures]
    memory: dict[str, float | None]
    plan: Reckoned
    parts: dict[str, float]
    budgets: Found | None = None
    rollout_ms: list[float] = field(default_factory=list)


def measure(
    subject: Subject, case: OwnCase, *, repeats: int, trl: bool, trial: bool, say: Callable[[str], None]
) -> Measured:
    """Raises what our own step raises; of TRL's it is told in its row."""
    device = subject.device
    say("memory of a step")
    settle(subject)
    parts_mib, tokens = measured_parts(subject), subject.run.step.micro_batch_tokens
    ours = Ours(subject)
    parts = median_parts([ours.timed_parts(examples) for examples in subject.windows])
    cuts = [len(subject.cut(window)) for window in subject.windows]
    rows: dict[str, Figures] = {OURS: {"status": "ok", **told(ours, subject.windows)}}
    rows[OURS]["micro_batches"] = statistics.fmean(cuts)
    with ExitStack() as stack:
        running: dict[str, Contestant] = {OURS: ours}
        if trl:
            say("TRL's trainer: the same gradient?")
            attempt(TRL, rows, running, partial(make_trl, subject, case, stack))
            if TRL in running:
                attempt(TRL, rows, running, partial(compared, subject, case, running))
        works: dict[str, Callable[[int], None]] = {OURS: Turns(subject, tokens)}
        if TRL in running:
            attempt(TRL, rows, running, partial(warmed, subject, case, running[TRL], works))
        for _ in subject.windows:
            works[OURS](0)
        say(f"{repeats} steps of each, in turn")
        times = interleaved(works, device, repeats=repeats, warmup=0)
        for name, values in times.items():
            rows[name] |= rates(values, subject.windows)
            rows[name]["time_to_ours"] = median_ratio(values, times[OURS])
            wait(device)
            rows[name]["host_share"] = host_share(partial(works[name], repeats), device)
            rows[name]["host_ms"] = rows[name]["host_share"] * rows[name]["step_ms_p50"]
        rows[OURS]["peak_mem_mib"] = parts_mib["all"] if device.type == "cuda" else None
        rows[OURS]["saved_mib"] = None if device.type == "cuda" else list(parts_mib.values())[-2]
        running.clear()
        works.clear()
    free_memory()
    plan = reckoned(subject)
    budgets = None
    if trial:
        say("other budgets of tokens")
        budgets = search(subject, repeats, say)
    return Measured(subject, case, rows, parts_mib, plan, parts, budgets, subject.rollout_ms)


def compared(subject: Subject, case: OwnCase, running: dict[str, Contestant]) -> Figures:
    """Its gradient against ours, without dropout, of which each side draws its own. ArithmeticError beyond rounding."""
    trial = on_trial(case, subject.windows[0])
    grads = {}
    for name in (OURS, TRL):
        rates_before = dropouts(running[name].model)
        for module in rates_before:
            module.p = 0.0
        grads[name] = gradient(running[name], trial)
        for module, rate in rates_before.items():
            module.p = rate
    return agreeing(case, grads[TRL], grads[OURS])


def dropouts(model: Any) -> dict[Any, float]:
    """The modules that drop out, and their rates."""
    return {module: module.p for module in model.modules() if isinstance(module, _DropoutNd)}


def warmed(subject: Subject, case: OwnCase, trl: Contestant, works: dict[str, Callable[[int], None]]) -> Figures:
    """Its memory, and every step once; only then it is one of those that are timed."""
    figures = told(trl, subject.windows) | memory(case, trl, subject.windows[subject.heaviest], subject.device)
    step = step_of(trl, [trl.prepare(window) for window in subject.windows])
    for round_ in range(len(subject.windows)):
        step(round_)
    works[TRL] = step
    figures["micro_batch"] = case.per_micro_batch(subject.windows[0])
    return figures


def median_parts(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each part over the windows, in the order of the first."""
    names = dict.fromkeys(name for one in found for name in one)
    return {name: statistics.median(one.get(name, 0.0) for one in found) for name in names}
