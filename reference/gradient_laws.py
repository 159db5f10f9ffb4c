"""The laws of a loss's gradient: it is that of the loss, and descent along it does what the loss is for.

Beside `generic_laws.py`, in whose words they speak.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from logratio.losses.types import Kind, Loss

from ._law_book import expect, law
from ._law_runs import inputs, leaves_of, parts_of, run, totals_of, with_leaves
from .strategies import LOGPS, Batch


@law(options={"max_rows": 3, "max_tokens": 3, "max_size": 1.0})
def gradient(loss: Loss, batch: Batch, moves: bool = True) -> None:
    """G is the gradient of L: for a direction v, G v == (L(x + h v) - L(x - h v)) / 2h; kinks are left out.

    What the loss collects of its own step moves with the policy, unless `moves` is False.
    """
    away = {part: values - 0.01 for part, values in batch.tokens["policy"].items()}  # from the edge at 0
    batch = replace(batch, tokens=batch.tokens | {"policy": away})
    leaves = leaves_of(loss, batch)
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
    expect(abs(slope - expected) <= tolerance, f"the slope by autograd is {slope:.8g}, by differences {expected:.8g}")


@law(level=st.sampled_from([1.0, 0.1, 8.0]))
def direction(loss: Loss, batch: Batch, level: float) -> None:
    """At policy = reference = old, with nothing to choose between two completions, descent never lowers the log-prob of
    a completion that is wanted nor raises that of one that is not, and moves something.

    Wanted: sequences, gold ones, prompts, chosen ones, the best of a list, label True, advantage 1; not: rejected, the
    worst of a list, False, -1.
    """
    count, width = len(batch), next(iter(batch.masks.values())).shape[1]
    full = torch.full((count, width), 1.0, dtype=torch.float64)
    tokens = {role: -level * full for role in LOGPS} | {"entropy": full, "log_z": 0 * full, "log_sum_p2": -full}
    tokens["divergence"] = full
    sign = torch.ones(count, dtype=torch.float64)
    rows = dict(batch.rows)
    if loss.kind is Kind.GROUPED:
        rows["advantages"] = sign = torch.where(rows["advantages"] < 0, -sign, sign)
    if loss.kind is Kind.PAIRED:
        rows["margin"] = rows["margin"].abs()  # below 0 chosen is the worse one
    if loss.kind is Kind.LABELED:
        sign = torch.where(rows["label"], sign, -sign)
    signs = {part: -sign if part == "rejected" else sign for part in batch.masks}
    if loss.kind is Kind.LISTED:
        rows["rewards"] = torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64).expand(count, 3)
        # the first is the worst of two, and of three neither the worst nor the best
        signs = {"first": -sign * (rows["sizes"] == 2), "second": sign, "third": -sign}
    even = Batch(
        batch.kind,
        {part: full.bool() for part in batch.masks},
        {role: dict.fromkeys(batch.masks, values) for role, values in tokens.items()},
        rows,
        0 * batch.collected,
    )
    grads = {part: grad.sum(-1) for part, grad in run(loss, even).grads.items() if part in parts_of(loss)}
    expect(any((grad != 0).any() for grad in grads.values()), "the gradient is 0 everywhere")
    largest = max(grad.abs().max().item() for grad in grads.values())
    for part, grad in grads.items():
        wrong = grad * signs[part] > 1e-12 * largest
        words = f"at {width} tokens of log-prob {-level:g}, dL/d(log-prob of {part}) is {grad.tolist()}"
        expect(not wrong.any(), f"{words}, wanted: {signs[part].tolist()}")
