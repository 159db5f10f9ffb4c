"""The numbers of the pictures: losses called on one small example, and what autograd says of it.

Nothing of a formula is here. A step on an example is the negative gradient in its summed log-probs: what descent adds
to them, up to the learning rate, were they free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logratio.losses import CompletionLogps, Kind, Loss, PairLogps, Totals, linear_jsd

Lines = dict[str, list[float]]
"""label -> a number for each x; NaN where there is none."""


class Drawn(NamedTuple):
    """panels: title -> lines, all over x."""

    x: list[float]
    panels: dict[str, Lines]


class Point(NamedTuple):
    """value: of one example, whatever else is in the step. step: -dL/d log p of each completion."""

    value: float
    step: tuple[float, ...]


TOKENS = 10
"""Of each completion of a pair: what averages over tokens sees a tenth of a sum."""
GIVEN = 1.0
"""The column `margin` of a pair."""
OTHERS = (-10.0, 0.0, 10.0)
"""Margins of the other pairs of the step, in nats, whose chosen completions are where the reference is; its own margins
of them are half as large."""
AT, OFF = 0.0, -5.0
"""The log-ratios of the chosen completion to the reference that a pair is drawn at."""
REFERENCE = -60.0
"""Its log-prob of each completion."""
UNREFERENCED = (-10.0, -30.0)
"""The chosen completion's log-probs that a pair is drawn at where a loss has no reference."""
REWARDS = (3.0, 2.0, 1.0, 0.0)
SHIFT = 5.0
"""KTO's estimate of the KL divergence, in nats."""
BESIDE = ((-5.0, -1.0), (-3.85, 0.0))
"""Log-probs of the other completions of a prompt, where these are compared, and their advantages over the first one's.
The first one's covariance becomes the largest at a log-ratio of 0.3."""
OLD = -3.0
"""The first one's old log-prob."""
ENTROPIES = (0.5, 3.0)
LENGTHS_TO_1 = {"max_completion_length": 1}


def minus(number: float) -> str:
    """As it is written on a picture and in a page."""
    return f"{number:g}".replace("-", "−")


def spaced(low: float, high: float, count: int = 81) -> list[float]:
    return torch.linspace(low, high, count, dtype=torch.float64).tolist()


def numbers(*values: float) -> Tensor:
    """A leaf for each, [n], float64."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def completions(sums: Tensor, tokens: int = 1, **stats: Tensor) -> CompletionLogps:
    """[n, tokens], the same log-prob for each token."""
    logps = (sums / tokens)[:, None].expand(-1, tokens)
    return CompletionLogps(logps, torch.ones(logps.shape, dtype=torch.bool), **stats)


def point(loss: Tensor, at: Sequence[Tensor], scale: float = 1.0) -> Point:
    """at: leaves of which each one's first number is meant."""
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    return Point(float(loss.detach()) * scale, tuple(-float(g) for leaf in at for g in slopes(leaf)))


def slopes(leaf: Tensor) -> list[float]:
    return [0.0] * leaf.numel() if leaf.grad is None else leaf.grad.tolist()


def of_pair(loss: Loss, state: Mapping[str, float], chosen: float, rejected: float) -> Point:
    """A pair with these log-probs, in a step with `OTHERS`."""
    w, l = numbers(chosen), numbers(rejected)  # noqa: E741
    others = torch.tensor(OTHERS, dtype=torch.float64)
    still = torch.full((1 + len(OTHERS),), REFERENCE, dtype=torch.float64)
    told = torch.cat([torch.zeros(1, dtype=torch.float64), others / 2])  # margins of the reference

    def pairs(w: Tensor, l: Tensor) -> PairLogps:  # noqa: E741
        there = still[: len(w)]
        told = {name: torch.full((len(w), TOKENS), ENTROPIES[-1], dtype=torch.float64) for name in loss.ref_stats}
        return PairLogps(
            completions(w, TOKENS, **told),
            completions(l, TOKENS, **told),
            prompt=completions(there, TOKENS) if loss.scores_prompt else None,
            gold=completions(there, TOKENS) if loss.scores_gold else None,
            margin=torch.full_like(there, GIVEN) if loss.wants_margin else None,
        )

    def reference(count: int) -> dict[str, PairLogps]:
        return {"ref": pairs(still[:count], (still - told)[:count])} if loss.wants_reference else {}

    step = pairs(torch.cat([w, still[1:]]), torch.cat([l, still[1:] - told[1:] - others]))
    collected = loss.collect(step, **reference(len(still))) if loss.window_pass else None
    totals = replace(Totals.of(step, collected), own=torch.zeros(1, dtype=torch.int64), state=state)
    one = pairs(w, l)
    return point(loss(one, **reference(1), totals=totals).loss, (w, l), 1 + len(OTHERS))


def pair(loss: Loss, state: Mapping[str, float]) -> Drawn:
    """Against the margin, which the rejected completion makes, at two places of the chosen one."""
    if loss.wants_reference:
        names = {f"chosen at r = {minus(r)}": REFERENCE + r for r in (AT, OFF)}
    else:
        names = {f"chosen at log p = {minus(log_p)}": log_p for log_p in UNREFERENCED}
    x = spaced(-30, 30, 121)
    value, weight, steps = {}, {}, {}
    for name, chosen in names.items():
        # no completion is certain
        found = [of_pair(loss, state, chosen, chosen - m) if chosen - m <= -1 else None for m in x]
        value[name] = column(found, lambda one: one.value)
        weight[name] = column(found, lambda one: (one.step[0] - one.step[1]) / 2)
        steps[name.replace("chosen", "steps")] = {
            "step of chosen": column(found, lambda one: one.step[0]),
            "step of rejected": column(found, lambda one: one.step[1]),
        }
    return Drawn(x, {"value": value, "weight of the margin": weight, **steps})


def column(found: Sequence[Point | None], read: Callable[[Point], float]) -> list[float]:
    return [math.nan if one is None else read(one) for one in found]


def labeled(loss: Loss, state: Mapping[str, float]) -> Drawn:
    """Against the log-ratio of one example, desirable or not."""
    x = spaced(-40, 40)
    still = completions(torch.full((1,), REFERENCE, dtype=torch.float64))

    def at(r: float, label: bool) -> Point:
        log_p = numbers(REFERENCE + r)
        policy = completions(log_p)
        mismatched = torch.tensor([SHIFT], dtype=torch.float64)
        collected = {"mismatched": mismatched, "own": loss.collect(policy, still), None: None}[loss.window_pass]
        totals = replace(Totals.of(policy, collected), state=state)
        return point(loss(policy, still, torch.tensor([label]), totals=totals).loss, (log_p,))

    return two_panels(x, {name: [at(r, name == "desirable") for r in x] for name in ("desirable", "undesirable")})


def grouped(loss: Loss, state: Mapping[str, float]) -> Drawn:
    """Against the log-ratio to the old policy, of a completion of one token; where a loss compares, beside others of
    the prompt, one of the opposite advantage and one of none, that do not move."""
    x, old = spaced(-1, 1, 101), OLD
    others, times = torch.tensor(BESIDE, dtype=torch.float64).unbind(1)
    beside, count = completions(others), 1 + len(BESIDE)

    def at(log_ratio: float, advantage: float) -> Point:
        log_p = numbers(old + log_ratio)
        policy, before = completions(log_p), completions(torch.full_like(log_p, old).detach())
        given: dict[str, Any] = {"advantages": torch.full_like(log_p, advantage).detach(), "old": before}
        if loss.wants_prompts:
            given["prompts"] = torch.zeros(1, dtype=torch.int64)
        if loss.wants_reference:
            given["ref"] = before
        if loss.window_pass is None:
            return point(loss(policy, **given, totals=Totals.of(policy)).loss, (log_p,))
        there = given | {"advantages": advantage * times, "old": beside}
        if loss.wants_prompts:
            there["prompts"] = torch.zeros(len(BESIDE), dtype=torch.int64)
        collected = torch.cat([loss.collect(policy, **given), loss.collect(beside, **there)])
        totals = replace(Totals.of(policy, collected), num_sequences=count, num_tokens=count)
        return point(loss(policy, **given, totals=totals).loss, (log_p,), 1 if loss.wants_prompts else count)

    return two_panels(x, {name: [at(r, a) for r in x] for name, a in (("A = 1", 1.0), ("A = −1", -1.0))})


def sequence(loss: Loss, state: Mapping[str, float]) -> Drawn:
    """Against the probability of one token, which is never certain, at two entropies of its place."""
    x = spaced(0.01, 0.99, 99)
    anchored = loss.divergence is not None and loss.divergence.anchored

    def at(p: float, entropy: float) -> Point:
        log_p = numbers(math.log(p))
        known = torch.full((1, 1), entropy, dtype=torch.float64)
        policy = completions(log_p, entropy=known, **apart(log_p))  # type: ignore[arg-type]
        return point(loss(policy, totals=Totals.of(policy)).loss, (log_p,))

    def apart(log_p: Tensor) -> dict[str, Tensor]:
        """The divergence from a teacher who is sure of this token, of two, or from a start to which both were alike."""
        if loss.divergence is None:
            return {}
        both = torch.cat([log_p, torch.log1p(-log_p.exp())])[None]
        words, other = torch.eye(2, dtype=log_p.dtype), 0.0 if anchored else -1e3
        teacher = torch.tensor([[0.0, other]], dtype=log_p.dtype)
        return {"divergence": linear_jsd(both, words, teacher, words, **loss.divergence.jsd)[None]}

    return two_panels(x, {f"H = {h:g} nats": [at(p, h) for p in x] for h in ENTROPIES})


def two_panels(x: list[float], found: Mapping[str, Sequence[Point]]) -> Drawn:
    value = {name: column(points, lambda one: one.value) for name, points in found.items()}
    step = {name: column(points, lambda one: one.step[0]) for name, points in found.items()}
    return Drawn(x, {"value": value, "step": step})


def listed(loss: Loss, state: Mapping[str, float]) -> Drawn:
    """Against the log-ratio of the best or of the worst of four completions, the others where the reference is."""
    x, last = spaced(-40, 40), len(REWARDS) - 1
    still = completions(torch.full((len(REWARDS),), REFERENCE, dtype=torch.float64))
    rewards, sizes = torch.tensor(REWARDS, dtype=torch.float64), [len(REWARDS)]

    def at(r: float, mover: int) -> Point:
        log_p = numbers(*(REFERENCE + r * (i == mover) for i in range(len(REWARDS))))
        policy = completions(log_p)
        totals = Totals.of(policy, sizes=sizes)
        return point(loss(policy, still, rewards, sizes, totals=totals).loss, (log_p,))

    found = {name: [at(r, i) for r in x] for name, i in (("the best moves", 0), ("the worst moves", last))}
    panels = {"value": {name: column(points, lambda one: one.value) for name, points in found.items()}}
    for name, points in found.items():
        panels[f"steps, {name}"] = {
            f"step at R = {reward:g}": column(points, lambda one, i=i: one.step[i])  # type: ignore[misc]
            for i, reward in enumerate(REWARDS)
        }
    return Drawn(x, panels)


WAYS: dict[Kind, Callable[[Loss, Mapping[str, float]], Drawn]] = {
    Kind.PAIRED: pair,
    Kind.LABELED: labeled,
    Kind.GROUPED: grouped,
    Kind.SEQUENCE: sequence,
    Kind.LISTED: listed,
}


def drawn(loss: Any, state: Mapping[str, float]) -> Drawn:
    return WAYS[loss.kind](loss, state)
