"""The largest and the fastest `micro_batch_tokens`, by trial on the run's own data.

The budget never changes what is computed. Budgets that cut the measured steps alike are one; each of the others takes
steps, in turn. On a GPU they grow until a step does not fit, and the border is then closed in on. A CPU's memory has no
such border (the system would end the process): there they grow to what one step's data fill, or to where what autograd
keeps would take more than half of the memory that is free.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from logratio.trainers.data.examples import Example
from logratio.trainers.errors import UserError

from ..measure.clock import free_memory, interleaved, median_ratio, peak_mem
from .ours import Turns
from .spent import kept_by_autograd
from .subject import Subject

MOST = 9
"""Budgets that are tried."""
SLOWER = 1.25
"""Times the fastest, from which on a budget takes no second round."""
SAME = 0.03
"""What is faster by less than this share is as fast."""
ROUND = 256
CLOSER = 3
"""Trials between the largest that fits and the smallest that does not."""
FREE_SHARE = 0.5


@dataclass
class Budget:
    """largest: tokens of the largest micro-batch, padding included. memory_mib: the peak on a GPU, on a CPU what
    autograd keeps. step_ms: None where it was not timed. to_asked: its time over that of the budget that the run asks
    for. why_not: why no step was taken."""

    tokens: int
    micro_batches: float
    largest: int
    memory_mib: float | None = None
    step_ms: float | None = None
    to_asked: float | None = None
    why_not: str = ""


@dataclass
class Found:
    """bound: what keeps `largest` from being larger, "memory" or "data"."""

    asked: int
    budgets: list[Budget] = field(default_factory=list)
    largest: int | None = None
    fastest: int | None = None
    bound: str = "data"

    def of(self, tokens: int | None) -> Budget | None:
        return next((one for one in self.budgets if one.tokens == tokens), None)


def search(subject: Subject, repeats: int, say: Callable[[str], None]) -> Found:
    """Take steps with each budget. The run's own `micro_batch_tokens` is set back."""
    asked = subject.run.step.micro_batch_tokens
    found = Found(asked)
    running: dict[int, Turns] = {}
    try:
        for tokens in ladder(subject, asked):
            if not attempted(subject, tokens, found, running):
                close_in(subject, tokens, found, running)
                break
        say(f"{len(running)} budgets from {min(running, default=0):,} to {max(running, default=0):,} tokens fit")
        timed(subject, found, running, repeats)
    finally:
        subject.run.step.micro_batch_tokens = asked
    found.budgets.sort(key=lambda one: one.tokens)
    found.largest = max(running, default=None)
    return found


def ladder(subject: Subject, asked: int) -> list[int]:
    """Budgets a factor of two apart, ascending, each of which cuts the steps otherwise; the asked one among them."""
    cuts = {asked: cut_by(subject, asked)}
    for factor, end in ((0.5, smallest(subject)), (2.0, most(subject))):
        tokens = asked
        while (tokens > end) if factor < 1 else (tokens < end):
            tokens = max(int(tokens * factor), 1)
            cuts[tokens] = cut_by(subject, tokens)
    kept: dict[Any, int] = {}
    for tokens in sorted(cuts, key=lambda one: max(one / asked, asked / one)):  # of several that cut alike the nearest
        kept.setdefault(cuts[tokens], tokens)
    found = sorted(kept.values())
    at = found.index(asked)
    start = max(0, min(at - MOST // 2, len(found) - MOST))
    return found[start : start + MOST]


def cut_by(subject: Subject, tokens: int) -> tuple[Any, ...]:
    """The shapes of all micro-batches of the measured steps."""
    step = subject.run.step
    before, step.micro_batch_tokens = step.micro_batch_tokens, tokens
    try:
        return tuple(tuple(m.batch.input_ids.shape) for window in subject.windows for m in subject.cut(window))
    finally:
        step.micro_batch_tokens = before


def smallest(subject: Subject) -> int:
    """Tokens of the shortest completion behind its prompt: below it no budget divides anything."""
    return min(len(e.prompt_ids) + len(c.ids) for w in subject.windows for e in w for c in e.completions)


def most(subject: Subject) -> int:
    """Tokens of the largest step in rows as long as its longest."""

    def padded(window: list[Example]) -> int:
        lengths = [len(e.prompt_ids) + sum(len(c.ids) for c in e.completions) for e in window]
        return len(lengths) * max(lengths)

    return max(map(padded, subject.windows))


def attempted(subject: Subject, tokens: int, found: Found, running: dict[int, Turns]) -> bool:
    """Take the heaviest step, and then all; whether that fits."""
    cut = cut_by(subject, tokens)
    budget = Budget(tokens, len(cut) / len(subject.windows), max(rows * length for rows, length in cut))
    found.budgets.append(budget)
    if reason := beyond_memory(subject, tokens, found):
        budget.why_not, found.bound = reason, "memory"
        return False
    try:
        heaviest = Turns(subject, tokens, subject.heaviest)
        if subject.device.type == "cuda":
            heaviest()
            budget.memory_mib = peak_mem(heaviest, subject.device)
        else:
            budget.memory_mib = kept_by_autograd(subject, heaviest)
        turns = Turns(subject, tokens)
        for _ in subject.windows:
            turns()
    except UserError as error:
        free_memory()
        budget.why_not, found.bound = str(error), "memory"
        return False
    running[tokens] = turns
    return True


def beyond_memory(subject: Subject, tokens: int, found: Found) -> str:
    """On a CPU: why a budget is not tried, by what autograd kept with the one before; empty where it is."""
    before, free = (found.budgets[-2] if len(found.budgets) > 1 else None), available_mib()
    if subject.device.type == "cuda" or before is None or free is None:
        return ""
    if before.memory_mib is None:  # gradient checkpointing
        return "not tried: nobody sees what such a step keeps" if tokens > found.asked else ""
    expected = before.memory_mib * tokens / before.tokens
    if expected <= FREE_SHARE * free:
        return ""
    return f"not tried: about {expected:,.0f} MiB for the backward pass, of {free:,.0f} that are free"


def available_mib() -> float | None:
    """Memory that the system could still give, as Linux tells it."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) / 2**10
    except (OSError, KeyError, ValueError):
        return None


def close_in(subject: Subject, failed: int, found: Found, running: dict[int, Turns]) -> None:
    """Between the largest that fits and the one that does not, on a GPU."""
    if subject.device.type != "cuda" or not running:
        return
    for _ in range(CLOSER):
        middle = (max(running) + failed) // 2 // ROUND * ROUND
        if not max(running) < middle < failed:
            return
        if not attempted(subject, middle, found, running):
            failed = middle


def timed(subject: Subject, found: Found, running: dict[int, Turns], repeats: int) -> None:
    """Let them take turns: a round of all, and then of those that are not far from the fastest."""
    rounds = len(subject.windows)
    times = interleaved(running, subject.device, repeats=rounds, warmup=0) if running else {}
    best = min(map(sum, times.values()), default=0.0)
    near = {n: turns for n, turns in running.items() if sum(times[n]) <= SLOWER * best or n == found.asked}
    if repeats > rounds and len(near) > 1:
        more = interleaved(near, subject.device, repeats=repeats - rounds, warmup=0)
        times |= {tokens: [*times[tokens], *values] for tokens, values in more.items()}
    for tokens, values in times.items():
        budget = found.of(tokens)
        assert budget is not None
        budget.step_ms = statistics.median(values)
        if found.asked in times:
            budget.to_asked = median_ratio(values, times[found.asked][: len(values)])
    ranked = {n: budget.to_asked for n in near if (budget := found.of(n)) and budget.to_asked}
    if ranked:
        fastest = min(ranked, key=ranked.__getitem__)
        found.fastest = fastest if ranked[fastest] < 1 - SAME else found.asked
    elif near:
        found.fastest = min(near, key=lambda tokens: sum(times[tokens]))
