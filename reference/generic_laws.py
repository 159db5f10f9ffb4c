"""The laws of every loss, one function each; see `laws.py`, which holds a loss to them.

In the equations, L is the loss, G its gradient with respect to the policy's log-probs (and statistics), M the means of
its metrics; `==` is up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from logratio.losses.types import Kind, Loss, Mean, misfit

from ._law_book import expect, law
from ._law_runs import (
    Result,
    arguments,
    collect,
    copy,
    inputs,
    leaves_of,
    logps_of,
    numbers,
    run,
    same,
    same_gradient,
    same_value,
    totals_of,
    with_leaves,
)
from .strategies import Batch, convert, pad, partitions, take


def per_example(loss: Loss, batch: Batch) -> Callable[[], list[float]]:
    """Each example's share of the loss, computed when it is needed: what may have cancelled in the sum."""

    def terms() -> list[float]:
        totals = totals_of(loss, batch)
        own = [replace(totals, own=torch.tensor([i])) for i in range(len(batch))]
        return [run(loss, take(batch, [i]), own[i]).loss.item() for i in range(len(batch))]

    return terms


@law()
def contract(loss: Loss, batch: Batch) -> None:
    """A loss returns a scalar with a graph, and metrics that are pairs (total, count) of scalars without one; what it
    carries to the next step are numbers.
    """
    leaves = {key: values.clone().requires_grad_() for key, values in leaves_of(loss, batch).items()}
    totals = totals_of(loss, batch)
    out = loss(**inputs(loss, with_leaves(batch, leaves)), totals=totals)
    expect(not (wrong := misfit(out)), wrong)
    expect(out.loss.is_floating_point(), f"the loss is {out.loss.dtype}")
    expect(out.loss.requires_grad, "the loss has no graph")
    for name, mean in out.metrics.items():
        for word, value in zip(("total", "count"), mean, strict=True):
            expect(isinstance(value, Tensor) and value.shape == (), f"the {word} of the metric {name} is {value!r}")
            expect(not value.requires_grad, f"the {word} of the metric {name} has a graph")
    for name, carried in loss.advance(totals).items():
        expect(isinstance(carried, int | float), f"advance() gives {name} as {type(carried).__name__}, not as a number")


@law()
def nothing_in_place(loss: Loss, batch: Batch) -> None:
    """A loss changes none of its arguments."""
    own = copy(batch)
    totals = totals_of(loss, batch)
    collected = None if totals.collected is None else totals.collected.clone()
    state = dict(totals.state)
    loss(**inputs(loss, own), totals=totals)
    for role, parts in batch.tokens.items():
        for part, values in parts.items():
            expect(torch.equal(values, own.tokens[role][part]), f"{role} of {part} was changed")
    for part, mask in batch.masks.items():
        expect(torch.equal(mask, own.masks[part]), f"the mask of {part} was changed")
    for name, values in batch.rows.items():
        expect(torch.equal(values, own.rows[name]), f"{name} was changed")
    if collected is not None:
        expect(torch.equal(collected.nan_to_num(), totals.collected.nan_to_num()), "totals.collected was changed")  # type: ignore[union-attr]
    expect(state == totals.state, "totals.state was changed")


@law()
def deterministic(loss: Loss, batch: Batch) -> None:
    """Called twice on the same batch, a loss gives the same L, G and M bit for bit, whatever the random state."""
    with torch.random.fork_rng(devices=[]):
        results = []
        for seed in (1, 2):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed asks after every device, which takes longer
            results.append(run(loss, batch))
    first, second = results
    once, again = ({name: (m.total.item(), m.count.item()) for name, m in x.metrics.items()} for x in results)
    expect(repr(once) == repr(again), f"{once}, then {again}")
    pairs = {f"the gradient of {name}": (first.grads[name], second.grads[name]) for name in first.grads}
    for words, (a, b) in {"the loss": (first.loss, second.loss), **pairs}.items():
        expect(((a == b) | (a.isnan() & b.isnan())).all(), f"{words} is {a.tolist()}, then {b.tolist()}")


@law(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def finite(loss: Loss, batch: Batch, dtype: torch.dtype) -> None:
    """L, G and M are finite in float32 for log-probs from -1e4 to 0, log-ratios and rewards from -1e4 to 1e4, and
    completions with nothing scored.
    """
    result = run(loss, convert(batch, lambda values: values.to(dtype).float()))
    expect(result.loss.isfinite(), f"the loss is {result.loss.item()}")
    for name, grad in result.grads.items():
        expect(grad.isfinite().all(), f"the gradient of {name} is {grad.tolist()}")
    for name, (total, _) in result.metrics.items():
        expect(total.isfinite(), f"the metric {name} has the total {total.item()}")


@law(fill=st.sampled_from([torch.nan, torch.inf, -7.0]))
def mask(loss: Loss, batch: Batch, fill: float) -> None:
    """What is masked is never read: L, G, M(batch with any numbers where masked) == L, G, M(batch); G = 0 there."""
    got = run(loss, pad(batch, left=0, right=0, fill=fill))
    same(got, run(loss, batch), per_example(loss, batch))
    for name, grad in got.grads.items():
        expect((grad[~batch.masks[name.split()[0]]] == 0).all(), f"the gradient of {name} is not 0 where masked")


@law(left=st.integers(0, 2), right=st.integers(0, 2))
def padding(loss: Loss, batch: Batch, left: int, right: int) -> None:
    """Masked columns on either side change nothing: L, G, M(padded batch) == L, G, M(batch)."""
    padded = run(loss, pad(batch, left=left, right=right, fill=torch.nan))
    width = {name: batch.masks[name.split()[0]].shape[1] for name in padded.grads}
    grads = {name: grad[:, left : left + width[name]] for name, grad in padded.grads.items()}
    same(padded._replace(grads=grads), run(loss, batch), per_example(loss, batch))


@law(order=lambda batch: st.permutations(range(len(batch))))
def permutation(loss: Loss, batch: Batch, order: Sequence[int]) -> None:
    """The order of the examples does not matter: L, M(permuted) == L, M(batch), G(permuted) == G(batch) permuted."""
    whole = run(loss, batch)
    expected = whole._replace(grads={name: grad[list(order)] for name, grad in whole.grads.items()})
    same(run(loss, take(batch, order)), expected, per_example(loss, batch))


@law(applies=lambda loss: loss.window_pass is not None, deal=lambda batch: partitions(len(batch)))
def collected(loss: Loss, batch: Batch, deal: Sequence[list[int]]) -> None:
    """`collect` takes the examples one by one: collect(a), collect(b) joined == collect(a and b), padded or not."""
    whole = collect(loss, take(batch, [i for rows in deal for i in rows]))
    wide = pad(batch, left=1, right=1, fill=torch.nan)
    joined = torch.cat([collect(loss, take(wide, rows)) for rows in deal])
    expect(joined.shape == whole.shape, f"the micro-batches give {list(joined.shape)}, all at once {list(whole.shape)}")
    close = torch.isclose(joined, whole, rtol=1e-12, atol=1e-9, equal_nan=True)
    expect(close.all(), f"the micro-batches give {joined.tolist()}, all at once {whole.tolist()}")


@law(deal=lambda batch: partitions(len(batch)))
def split(loss: Loss, batch: Batch, deal: Sequence[list[int]]) -> None:
    """Micro-batches add up: sum of L(micro-batch, totals of the step) == L(step); so for G, and M over them is M(step).

    What the loss collects comes in the order of the micro-batches, and `own` says where.
    """
    totals = totals_of(loss, batch)
    whole = run(loss, batch, totals)
    if loss.window_pass == "own":
        totals = replace(totals, collected=torch.cat([collect(loss, take(batch, rows)) for rows in deal]))
    grads = {name: torch.full_like(grad, torch.nan) for name, grad in whole.grads.items()}
    metrics: dict[str, Mean] = {}
    value, start = torch.zeros((), dtype=whole.loss.dtype), 0
    for rows in deal:
        own = torch.arange(start, start + len(rows))
        part = run(loss, take(batch, rows), replace(totals, own=own))
        value, start = value + part.loss, start + len(rows)
        for name, grad in part.grads.items():
            grads[name][rows] = grad
        for name, metric in part.metrics.items():
            metrics[name] = metrics[name].joined(metric) if name in metrics else metric
    same(Result(value, grads, metrics), whole, per_example(loss, batch))


@law(options={"all_masked": True}, fill=st.sampled_from([-1.0, torch.nan]))
def nothing_scored(loss: Loss, batch: Batch, fill: float) -> None:
    """Where nothing is scored, L = 0 and G = 0, with a graph and not NaN, and no metric counts anything."""
    result = run(loss, pad(batch, left=0, right=0, fill=fill))
    expect(result.loss == 0, f"the loss is {result.loss.item()}")
    for name, grad in result.grads.items():
        expect((grad == 0).all(), f"the gradient of {name} is {grad.tolist()}")
    for name, (total, count) in result.metrics.items():
        words = f"the metric {name} has the total {total.item()} and the count {count.item()}"
        expect(total == 0 and count == 0, words)


@law(options={"min_rows": 2}, row=lambda batch: st.integers(0, len(batch) - 1))
def empty_example(loss: Loss, batch: Batch, row: int) -> None:
    """An example with nothing scored counts in B and says nothing else: L, G, M(batch) == L, G, M(the others, B)."""
    at = torch.arange(len(batch)) != row
    batch = replace(batch, masks={part: mask & at[:, None] for part, mask in batch.masks.items()})
    others = take(batch, at.nonzero()[:, 0].tolist())
    counted = replace(totals_of(loss, others), num_sequences=len(batch), num_prompts=len(batch))
    got, expected = run(loss, batch), run(loss, others, counted)
    same(got._replace(grads={name: grad[at] for name, grad in got.grads.items()}), expected, per_example(loss, batch))


@law(dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def low_precision(loss: Loss, batch: Batch, dtype: torch.dtype) -> None:
    """Low precision is computed with as float32: L(low) = L(low as float32) bit for bit, G but for rounding."""
    low = convert(batch, lambda values: values.to(dtype))
    low = replace(low, collected=low.collected.float())  # what `collect` returns is float32 already
    got, expected = run(loss, low), run(loss, convert(low, torch.Tensor.float))
    expect(got.loss.dtype == torch.float32, f"the loss is {got.loss.dtype}")
    expect(torch.equal(got.loss, expected.loss), f"{got.loss.item()} in {dtype}, {expected.loss.item()} in float32")
    for name, grad in expected.grads.items():
        off = (got.grads[name].float() - grad.to(dtype).float()).nan_to_num().abs()  # beyond float16 both are infinite
        bound = 16 * torch.finfo(dtype).eps * grad.abs().max()
        expect(
            (off <= bound).all(), f"the gradient of {name} is {numbers(got.grads[name])}, in float32 {numbers(grad)}"
        )


@law(applies=lambda loss: loss.wants_reference or loss.kind in (Kind.GROUPED, Kind.SEQUENCE))
def only_the_policy_learns(loss: Loss, batch: Batch) -> None:
    """The gradient is the policy's: dL/d(reference) = dL/d(old policy) = dL/d(sampler's) = dL/d(weights) = 0."""
    still = ("policy", "is_top1", *loss.stats)
    others = {role: parts for role, parts in batch.tokens.items() if role not in still}
    leaves = {(role, part): x.clone().requires_grad_() for role, parts in others.items() for part, x in parts.items()}
    run(loss, with_leaves(batch, leaves), totals_of(loss, batch))
    for (role, part), leaf in leaves.items():
        expect(leaf.grad is None or (leaf.grad == 0).all(), f"{role} of {part} got the gradient {leaf.grad}")


@law(
    applies=lambda loss: loss.wants_reference or loss.kind in (Kind.GROUPED, Kind.LABELED, Kind.LISTED),
    options={"min_rows": 2},
)
def no_broadcast(loss: Loss, batch: Batch) -> None:
    """What is given of 1 row beside a policy of C, a reference or labels, say, is refused."""
    kwargs, one = arguments(loss, batch), inputs(loss, take(batch, [0]))
    for name in sorted(one.keys() - {"policy"}):
        try:
            loss(**kwargs | {name: one[name]})
        except (ValueError, TypeError, RuntimeError, IndexError):
            continue
        raise AssertionError(f"`{name}` of 1 row was taken for {len(batch)}")


@law(applies=lambda loss: loss.wants_prompts, first=st.sampled_from([2**25, 2**42]))
def renumbered(loss: Loss, batch: Batch, first: int) -> None:
    """Which numbers the prompts have does not matter, up to 2^43: L, G(prompts + n) == L, G(prompts) in float32, whose
    whole numbers end at 2^24.
    """
    batch = convert(batch, Tensor.float)
    renamed = replace(batch, rows=batch.rows | {"prompts": batch.rows["prompts"] + first})
    got, expected = run(loss, renamed), run(loss, batch)
    words = f"the loss is {got.loss.item():.7g}, expected {expected.loss.item():.7g}"
    expect(torch.equal(got.loss, expected.loss), words)
    same_gradient(got.grads, expected.grads)


@law(applies=lambda loss: loss.kind is Kind.GROUPED)
def without_old(loss: Loss, batch: Batch) -> None:
    """Without `old` the batch is on policy: L, G(old=None) == L, G(old=policy)."""
    got = run(loss, batch, old=None)
    expected = run(loss, batch, old=logps_of(loss, batch, "policy").detach())
    same_value(got.loss, expected.loss)
    same_gradient(got.grads, expected.grads)
