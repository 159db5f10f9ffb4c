"""A step on a window of examples, in as many micro-batches as it takes: see `memory.py` for what does not fit."""

from __future__ import annotations

from collections.abc import Callable

from .batches.packing import split_groups
from .batches.values import repacked
from .step import Step, StepResult, Window


def learn(step: Step, window: Window, meanwhile: Callable[[], None] | None = None) -> StepResult:
    """The window's gradient, added up, and this process's part of loss and metrics.

    A micro-batch that does not fit into memory changes how the window is cut, from here on, and nothing else.
    """

    def attempt() -> StepResult:
        cut_again(step, window)
        totals = step.totals(window.examples, window.micros, window.dealt)
        return step(window.micros, totals, meanwhile=meanwhile)

    result = step.memory.again(attempt)
    window.taken += 1
    return result


def cut_again(step: Step, window: Window) -> None:
    """Pack the window by today's budget, where it was packed by another.

    What its later steps are compared with stays, as it was computed before its first; until that is taken, it is
    computed anew, as it would have been from the start.
    """
    before, budget = window.micros, step.micro_batch_tokens
    if all(micro.budget in (None, budget) for micro in before):
        return
    parts = split_groups(window.examples, budget, step.policy.shared) if window.dealt else window.examples
    window.micros = step.micro_batches(parts, window.dealt)
    if not window.taken:
        if before[0].old is not None:
            step.memory.together(lambda: step.fill_old(window.micros))
        return
    batches = [micro.batch for micro in window.micros]
    refs = [(m.batch, m.ref) for m in before if m.ref is not None]
    olds = [(m.batch, m.old) for m in before if m.old is not None]
    for micro, ref in zip(window.micros, repacked(refs, batches), strict=bool(refs)):
        micro.ref = ref
    for micro, old in zip(window.micros, repacked(olds, batches), strict=bool(olds)):
        micro.old = old
