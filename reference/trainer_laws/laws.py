"""The laws of every trainer, one function each; see `check_trainer`.

A window is what one optimizer step learns from: `batch_size` rows, however many micro-batches and processes they take.
Rows differ only in what their law speaks of (`DESIGNS`), so that a fault breaks the law that is its own.
"""

from __future__ import annotations

import torch

from .._verdicts import Broken, NotAsked
from .book import Asking, Case, law
from .compared import equal, listed, rounding, same_run, same_start, same_vector, tolerance
from .trained import Trained, joined

STRAIGHT, SLOPE = 0.1, 0.05
"""How far the slopes of a step and of half of it may be apart, where the law `gradient` measures one; and how far it
may be from 1, which leaves room for the square of the first."""
SEEN = 1e-4
"""Change of a loss, beside it or 1, that float32 tells to a hundredth."""


@law(steps=2)
def deterministic(ask: Asking, case: Case) -> None:
    """The same rows and seed give the same losses and weights, bit for bit, whatever the random state before."""
    runs = []
    with torch.random.fork_rng(devices=[]):
        for state in (1, 2):
            torch.manual_seed(state)
            runs.append(ask.run(case, again=True))
    first, second = runs
    same_start(second, first, "the second of two equal runs")
    if list(first.losses) != list(second.losses):
        raise Broken(f"the second of two equal runs: losses {list(second.losses)} against {list(first.losses)}")
    differ = [name for name in first.end if not equal(first.end[name], second.end[name])]
    if differ:
        raise Broken(f"the second of two equal runs: other weights in {listed(differ)}")


@law(steps=2)
def frozen(ask: Asking, case: Case) -> None:
    """What is not trained is unmoved, bit for bit."""
    trained = ask.run(case)
    if len(trained.moving) == len(trained.start):
        raise NotAsked("every tensor is trained")
    _unmoved(trained, set(trained.moving))


@law(steps=3)
def moves(ask: Asking, case: Case) -> None:
    """What is trained moves, every tensor of it, within three steps."""
    trained = ask.run(case)
    still = [name for name in trained.moving if equal(trained.start[name], trained.end[name])]
    if still or not trained.moving:
        raise Broken(f"unmoved: {listed(still) or 'there is nothing that trains'}")


@law(steps=2)
def learning_rate_0(ask: Asking, case: Case) -> None:
    """With learning rate 0 every weight stays as it is, bit for bit, weight decay or not."""
    ask.needs("learning_rate")
    _unmoved(ask.run(case, learning_rate=0.0), None)


@law(steps=2)
def no_noise(ask: Asking, case: Case) -> None:
    """With learning rate 0 the loss of the same rows is the same at every step: no dropout, nothing else at random."""
    ask.needs("learning_rate")
    trained = ask.run(case, learning_rate=0.0)
    first, second = trained.losses
    if not abs(first - second) <= tolerance(trained, ask.rtol) * max(abs(first), 1.0):
        raise Broken(f"the same weights and rows, and the loss is {first:.6g}, then {second:.6g}")


@law(design="uneven")
def start(ask: Asking, case: Case) -> None:
    """The loss of the first step is the one that is known: ln 2 for DPO, whose policy is its reference."""
    if ask.loss_at_start is None:
        raise NotAsked("loss_at_start is not given")
    trained = ask.run(case)
    if not abs(trained.losses[0] - ask.loss_at_start) <= tolerance(trained, ask.rtol) * max(abs(ask.loss_at_start), 1):
        raise Broken(f"it is {trained.losses[0]:.6g}, expected {ask.loss_at_start:.6g}")


@law(steps=2)
def gradient(ask: Asking, case: Case) -> None:
    """The gradient is that of the loss that is reported: L(w + d) - L(w) -> g . d for small d."""
    ask.needs("learning_rate")
    if ask.learning_rate is None:
        raise NotAsked("fn's learning_rate has no default to begin with")
    found = None
    for part in (1.0, 1 / 8, 1 / 64, 1 / 512):
        whole, half = (_slope(ask, case, ask.learning_rate * part * length) for length in (1.0, 0.5))
        if abs(whole - half) > STRAIGHT * abs(half):
            continue
        slope = 2 * half - whole  # what both would be for a step of no length, up to its square
        if abs(slope - 1) <= SLOPE:
            return
        if found is not None and abs(slope - found) <= SLOPE * abs(found):  # no accident of a step that is too large
            raise Broken(f"the loss falls {slope:.2g} times as fast as the gradient says")
        found = slope
    raise NotAsked(f"steps of the learning rate {ask.learning_rate:g}, and of a 512th, are too large to tell a slope")


@law(steps=2, fewest=2)
def split(ask: Asking, case: Case) -> None:
    """The size of micro-batches changes nothing: every row's gradient is there once, whatever it was computed with."""
    _cut(ask, case)


@law(design="uneven", fewest=2)
def uneven(ask: Asking, case: Case) -> None:
    """The size of micro-batches changes nothing where they score unevenly many tokens: no mean of means."""
    _cut(ask, case)


@law(design="ragged", fewest=2)
def padding(ask: Asking, case: Case) -> None:
    """A longer row beside it changes nothing for a row: padding is neither scored nor seen."""
    _cut(ask, case)


@law(count=6, batch_size=4, steps=2)
def last_window(ask: Asking, case: Case) -> None:
    """A last window with fewer rows than the others is learned from as the others are, in any micro-batches."""
    _cut(ask, case)


@law(design="uneven", count=3, steps=2, fewest=2)
def order(ask: Asking, case: Case) -> None:
    """The order of the rows within a window changes nothing."""
    backwards = tuple(reversed(range(case.count)))
    same_run(ask.run(case, order=backwards), ask.run(case), "rows backwards against forwards", ask.rtol)


@law(design="uneven", fewest=2)
def world_size(ask: Asking, case: Case) -> None:
    """Two processes learn what one does."""
    ask.needs("processes")
    got = ask.run(case, processes=2, micro_batch_size=case.block)
    same_run(got, ask.run(case), "processes=2 against 1", ask.rtol)


@law(fewest=2)
def update(ask: Asking, case: Case) -> None:
    """The first step is the optimizer's formula of the whole window's gradient."""
    whole = ask.run(case)
    if whole.gradient is None or whole.update is None:
        raise NotAsked("the run does not tell its gradient and update")
    got = ask.run(case, micro_batch_size=case.block)
    start = {name: got.start[name].double() for name in whole.gradient}
    expected = {name: whole.update(start[name], g.double()) - start[name] for name, g in whole.gradient.items()}
    moved = {name: got.end[name].double() - start[name] for name in expected}
    same_vector(moved, expected, "the update", "against the formula", tolerance(whole, ask.rtol), rounding(whole))


@law(count=6, batch_size=2, steps=3)
def resume(ask: Asking, case: Case) -> None:
    """A run that ends after two steps and goes on from what it saved is the run that did not end."""
    ask.needs("stop_after")
    whole, again = ask.run(case), ask.run(case, stop_after=2)
    same_run(again, whole, "gone on after step 2 against whole", ask.rtol)


def _cut(ask: Asking, case: Case) -> None:
    """The run in the smallest micro-batches against the run in whole windows."""
    ask.needs("micro_batch_size")
    words = f"micro_batch_size={case.block} against {case.batch_size or case.count}"
    same_run(ask.run(case, micro_batch_size=case.block), ask.run(case), words, ask.rtol)


def _unmoved(trained: Trained, but: set[str] | None) -> None:
    for name, before in trained.start.items():
        after = trained.end[name]
        if name not in (but or ()) and not equal(before, after):
            apart = (before.double() - after.double()).abs().max().item()
            raise Broken(f"{name} has moved, by up to {apart:.3g}")


def _slope(ask: Asking, case: Case, learning_rate: float) -> float:
    """Of the first of two steps on the same rows, the loss's change over what the gradient says of it."""
    first, both = (ask.run(case, learning_rate=learning_rate, steps=steps) for steps in (1, 2))
    if first.gradient is None:
        raise NotAsked("the run does not tell its gradient")
    names = sorted(first.gradient)
    moved = joined(first.end, names) - joined(first.start, names)
    expected = (joined(first.gradient, names) @ moved).item()
    if not expected:
        raise NotAsked("the gradient is 0")
    changed = both.losses[1] - both.losses[0]
    if not abs(changed) > SEEN * max(abs(both.losses[0]), 1.0):
        raise NotAsked(f"a step of the learning rate {learning_rate:.3g} changes the loss too little to tell a slope")
    return changed / expected
