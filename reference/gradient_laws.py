"""The laws of a loss's gradient: it is that of the loss, and descent along it does what the loss is for.

Beside `generic_laws.py`, in whose words they speak.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from logratio.losses.types import Kind, Loss

from ._law_book import expect, law
from ._law_runs import inputs, leaves_of, parts_of, run, totals_of, with_leaves
from .strategies import LOGPS, Batch


@law(options={"max_rows": 3, "max_tokens": 3, "max_size": 1.0})
def gradient(loss: Loss, batch: Batch, moves: bool = True) -> None:
    """G is the gradient of L: for a direction v, G v == (L(x + h v) - L(x - h v)) / 2h; kinks are left out.

    What the loss collects of its own step moves with the policy, unless `moves` is False. So do statistics of
    it that come without gradient.
    """
    away = {part: values - 0.01 for part, values in batch.tokens["policy"].items()}  # from the edge at 0
    batch = replace(batch, tokens=batch.tokens | {"policy": away})
    every = leaves_of(loss, batch, constants=True)
    leaves = {key: x for key, x in every.items() if x.is_floating_point()}
    directions = {
        key: torch.cos(torch.arange(x.numel(), dtype=x.dtype) + i).view_as(x)
        for i, (key, x) in enumerate(leaves.items())
    }
    totals, step = totals_of(loss, batch), 1e-6

    @torch.no_grad()
    def value(by: float) -> float:
        moved = with_leaves(batch, {key: x + by * directions[key] for key, x in leaves.items()})
        now = replace(totals_of(loss, moved), state=totals.state) if moves else totals
        return loss(**inputs(loss, moved), totals=now).loss.item()

    down, here, up = (value(by) for by in (-step, 0.0, step))
    left, right = (here - down) / step, (up - here) / step
    if abs(left - right) >= 1e-3 * (1 + abs(left)):
        return
    grads = run(loss, batch, totals).grads
    named = {part if role == "policy" else f"{part} {role}": v for (role, part), v in directions.items()}
    slope = sum((grads[name] * named[name]).sum().item() for name in grads)
    expected = (up - down) / (2 * step)
    tolerance = 1e-5 * abs(expected) + 1e-7 * (1 + abs(here))
    words = f"the slope by autograd is {slope:.8g}, by differences {expected:.8g}"
    still = sorted({role for role, _ in every.keys() - leaves_of(loss, batch).keys()})
    more = f" (without gradient: {', '.join(still)})" if still else ""
    expect(abs(slope - expected) <= tolerance, words + more)


def even(loss: Loss, batch: Batch, level: float) -> Batch:
    """The batch with every token scored and of the same log-prob, -level, by all models."""
    count, width = len(batch), next(iter(batch.masks.values())).shape[1]
    full = torch.full((count, width), 1.0, dtype=torch.float64)
    tokens = {role: -level * full for role in LOGPS} | {"entropy": full, "log_z": 0 * full, "log_sum_p2": -full}
    tokens |= {"divergence": full, "is_top1": level * full < math.log(2)}
    rows = dict(batch.rows)
    if loss.kind is Kind.GROUPED:
        rows["advantages"] = torch.where(rows["advantages"] < 0, -full[:, 0], full[:, 0])
    if loss.kind is Kind.PAIRED:
        rows["margin"] = rows["margin"].abs()  # below 0 chosen is the worse one
    if loss.kind is Kind.LISTED:
        rows["rewards"] = torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64).expand(count, 3)
    return Batch(
        batch.kind,
        {part: full.bool() for part in batch.masks},
        {role: dict.fromkeys(batch.masks, values) for role, values in tokens.items()},
        rows,
        0 * batch.collected,
    )


def signs_of(batch: Batch) -> dict[str, Tensor]:
    """part -> [C], 1 where it is wanted, -1 where it is not, 0 where neither."""
    ones = torch.ones(len(batch), dtype=torch.float64)
    if batch.kind == Kind.LISTED:  # the first is the worst of two, and of three neither the worst nor the best
        return {"first": -ones * (batch.rows["sizes"] == 2), "second": ones, "third": -ones}
    if batch.kind == Kind.LABELED:
        ones = torch.where(batch.rows["label"], ones, -ones)
    ones = batch.rows.get("advantages", ones)
    return {part: -ones if part == "rejected" else ones for part in batch.masks}


@law(level=st.sampled_from([1.0, 0.1, 8.0]), made=even)
def direction(loss: Loss, batch: Batch, level: float) -> None:
    """At policy = reference = old, with nothing to choose between two completions, descent never lowers the log-prob of
    a completion that is wanted nor raises that of one that is not, and moves something.

    Wanted: sequences, gold ones, prompts, chosen ones, the best of a list, label True, advantage 1; not: rejected, the
    worst of a list, False, -1.
    """
    batch = even(loss, batch, level)
    signs, width = signs_of(batch), next(iter(batch.masks.values())).shape[1]
    grads = {part: grad.sum(-1) for part, grad in run(loss, batch).grads.items() if part in parts_of(loss)}
    expect(any((grad != 0).any() for grad in grads.values()), "the gradient is 0 everywhere")
    largest = max(grad.abs().max().item() for grad in grads.values())
    for part, grad in grads.items():
        wrong = grad * signs[part] > 1e-12 * largest
        words = f"at {width} tokens of log-prob {-level:g}, dL/d(log-prob of {part}) is {grad.tolist()}"
        expect(not wrong.any(), f"{words}, wanted: {signs[part].tolist()}")
