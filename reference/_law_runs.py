"""A loss run on a batch of `strategies`, as the trainer would, and the comparison of two such runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logratio.losses.types import CompletionLogps, Kind, Loss, Mean, PairLogps, Totals

from .strategies import CONSTANTS, PARTS, STATS, Batch

RTOL = 1e-10
"""float64's rounding of sums in another order."""
EPS = torch.finfo(torch.float64).eps
ROUNDINGS = 16
"""Of a token on its way into a loss, its reference's among them."""


class Result(NamedTuple):
    """A loss, its gradient by the policy's tensors ("chosen", "chosen entropy"), and its metrics.

    rounding: by how much the loss changes where all that it is a function of is rounded once more.
    """

    loss: Tensor
    grads: dict[str, Tensor]
    metrics: dict[str, Mean]
    rounding: float = 0.0


def parts_of(loss: Loss) -> tuple[str, ...]:
    """What of an example the loss is given."""
    unused = {"prompt": not loss.scores_prompt, "gold": not loss.scores_gold}
    return tuple(part for part in PARTS[loss.kind] if not unused.get(part))


def stats_of(loss: Loss) -> list[str]:
    """What it is given of every token beside the log-prob."""
    asked = (*loss.stats, *(["divergence"] if loss.divergence is not None else []))
    return [name for name in STATS if name in asked]


def logps_of(loss: Loss, batch: Batch, role: str, part: str = "completion") -> CompletionLogps:
    """With the statistics that the loss has asked for; the policy's with weights where the batch has them."""
    wanted = {"policy": (*stats_of(loss), "weights"), "ref": loss.ref_stats}.get(role, ())
    more = {name: batch.tokens[name][part] for name in wanted if name in batch.tokens}
    return CompletionLogps(batch.tokens[role][part], batch.masks[part], **more)


def inputs(loss: Loss, batch: Batch) -> dict[str, Any]:
    """What a loss of the batch's kind is called with beside `totals`."""
    roles = {"policy": True, "ref": loss.wants_reference, "old": loss.kind is Kind.GROUPED}
    roles["behavior"] = loss.wants_behavior
    kwargs: dict[str, Any] = {}
    for role in (role for role, wanted in roles.items() if wanted):
        if loss.kind is Kind.PAIRED:
            parts = ("chosen", "rejected") if role == "ref" else parts_of(loss)
            margin = batch.rows["margin"] if role == "policy" and loss.wants_margin else None
            kwargs[role] = PairLogps(**{part: logps_of(loss, batch, role, part) for part in parts}, margin=margin)
        elif loss.kind is Kind.LISTED:
            kwargs[role] = joined([logps_of(loss, batch, role, part) for part in parts_of(loss)], batch.rows["sizes"])
        else:
            kwargs[role] = logps_of(loss, batch, role)
    if loss.kind is Kind.LISTED:
        sizes, rewards = batch.rows["sizes"], batch.rows["rewards"]
        return kwargs | {"sizes": sizes.tolist(), "rewards": rewards[torch.arange(rewards.shape[1]) < sizes[:, None]]}
    if loss.wants_prompt_tokens:  # as if each prompt had another completion, somewhere else, of one token more
        kwargs["prompt_tokens"] = 2 * batch.masks["completion"].sum(-1) + 1
    return kwargs if loss.kind is Kind.PAIRED else kwargs | given_rows(loss, batch)


def given_rows(loss: Loss, batch: Batch) -> dict[str, Tensor]:
    """The batch's `rows` that the loss is called with."""
    return {name: values for name, values in batch.rows.items() if name != "prompts" or loss.wants_prompts}


def joined(parts: Sequence[CompletionLogps], sizes: Tensor) -> CompletionLogps:
    """Lists of completions one after the other: of the first, second, ... of each list those that it has."""
    width = max(part.completion_mask.shape[1] for part in parts)
    present = torch.arange(len(parts)) < sizes[:, None]

    def of(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            return None
        wide = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in values]
        return torch.stack(wide, 1)[present]

    tensors = {f.name: of(f.name) for f in fields(CompletionLogps)}
    return CompletionLogps(**tensors)  # type: ignore[arg-type]


def collect(loss: Loss, batch: Batch, **changed: Any) -> Tensor:
    """`loss.collect` on the batch, as in the pass before a step; `changed` replaces arguments."""
    with torch.no_grad():
        return loss.collect(**inputs(loss, batch) | changed)


def totals_of(loss: Loss, batch: Batch, **changed: Any) -> Totals:
    """The totals of a step that is this batch, after `batch.earlier` steps on the same."""
    own = lambda: collect(loss, batch, **changed)  # noqa: E731
    collected = {"mismatched": lambda: batch.collected, "own": own, None: lambda: None}
    given = inputs(loss, batch) | changed
    totals = Totals.of(given["policy"], collected[loss.window_pass](), given.get("sizes"), given.get("advantages"))
    for _ in range(batch.earlier):
        totals = replace(totals, state=loss.advance(totals))
    return totals


def arguments(loss: Loss, batch: Batch) -> dict[str, Any]:
    """`inputs` and the `totals` of this batch alone."""
    return inputs(loss, batch) | {"totals": totals_of(loss, batch)}


def leaves_of(loss: Loss, batch: Batch, constants: bool = False) -> dict[tuple[str, str], Tensor]:
    """(role, part) -> what of the policy a gradient may flow into: log-probs and the asked for statistics.

    constants: with those numbers that no gradient flows into, though they too are the policy's.
    """
    roles = ("policy", *(name for name in stats_of(loss) if constants or name not in CONSTANTS))
    return {(role, part): batch.tokens[role][part] for role in roles for part in parts_of(loss)}


def with_leaves(batch: Batch, leaves: Mapping[tuple[str, str], Tensor]) -> Batch:
    """The batch with these tensors in the places of its own."""
    tokens = {role: dict(parts) for role, parts in batch.tokens.items()}
    for (role, part), values in leaves.items():
        tokens[role][part] = values
    return replace(batch, tokens=tokens)


def copy(batch: Batch) -> Batch:
    """The same numbers in other tensors."""

    def cloned(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.clone() for name, x in values.items()}

    tokens = {role: cloned(parts) for role, parts in batch.tokens.items()}
    rows, collected = cloned(batch.rows), batch.collected.clone()
    return replace(batch, masks=cloned(batch.masks), tokens=tokens, rows=rows, collected=collected)


def run(loss: Loss, batch: Batch, totals: Totals | None = None, **changed: Any) -> Result:
    """Value, gradient and metrics; `changed` replaces arguments of the loss."""
    leaves = {key: values.detach().clone().requires_grad_() for key, values in leaves_of(loss, batch).items()}
    kwargs = inputs(loss, with_leaves(batch, leaves))
    totals = totals_of(loss, batch, **changed) if totals is None else totals
    out = loss(**kwargs | changed, totals=totals)
    out.loss.backward()
    grads = {
        part if role == "policy" else f"{part} {role}": leaf.grad
        for (role, part), leaf in leaves.items()
        if leaf.grad is not None
    }
    slopes = [float((leaf.grad * leaf.detach()).abs().nansum()) for leaf in leaves.values() if leaf.grad is not None]
    return Result(out.loss.detach(), grads, out.metrics, EPS * sum(slopes))


def same(got: Result, expected: Result, terms: Callable[[], list[float]] = list) -> None:
    """Raise AssertionError unless value, gradient and means of the metrics agree to `RTOL`.

    terms: what may have cancelled in the loss, for its tolerance.
    """
    same_value(got.loss, expected.loss, terms, ROUNDINGS * max(got.rounding, expected.rounding))
    same_gradient(got.grads, expected.grads)
    if got.metrics.keys() != expected.metrics.keys():
        raise AssertionError(f"metrics {sorted(got.metrics)}, expected {sorted(expected.metrics)}")
    for name in expected.metrics:
        means = [(m.total / m.count.clamp(min=1)).item() for m in (got.metrics[name], expected.metrics[name])]
        if not math.isclose(*means, rel_tol=1e-9, abs_tol=1e-9):
            raise AssertionError(f"the mean of the metric {name} is {means[0]:.12g}, expected {means[1]:.12g}")


def same_value(
    got: Tensor | float, expected: Tensor | float, terms: Callable[[], list[float]] = list, rounding: float = 0.0
) -> None:
    """Raise AssertionError unless they agree to `RTOL` of the largest, that of `terms` included, or to `rounding`.

    Two infinities or NaN agree, here and in a gradient: that they are no numbers is another law's."""
    got, expected = float(got), float(expected)
    off = abs(got - expected)
    if off <= rounding or got == expected or (math.isnan(got) and math.isnan(expected)):
        return
    agrees = off <= RTOL * abs(expected) or off <= RTOL * max(map(abs, (expected, *terms())))
    if not (agrees and math.isfinite(off)):
        raise AssertionError(f"the loss is {got:.12g}, expected {expected:.12g}")


def same_gradient(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise AssertionError unless they agree to `RTOL` of each tensor's largest entry; an absent one is 0."""
    for name in sorted({*got, *expected}):
        a, b = got.get(name), expected.get(name)
        a, b = torch.zeros_like(b) if a is None else a, torch.zeros_like(a) if b is None else b  # type: ignore[arg-type]
        alike = ~a.isfinite() & torch.isclose(a, b, rtol=0, atol=0, equal_nan=True)
        a, b = a.masked_fill(alike, 0.0), b.masked_fill(alike, 0.0)
        off = (a - b).abs().max()
        if not off.isfinite() or off > RTOL * max(a.abs().max().item(), b.abs().max().item()):
            raise AssertionError(f"the gradient of {name} is {numbers(a)}, expected {numbers(b)}")


def numbers(values: Tensor, mask: Tensor | None = None, there: Tensor | None = None) -> str:
    """Rows of numbers, `_` where masked; a row that is not `there` is []."""
    if values.ndim == 1:
        return "[" + ", ".join(f"{x:.7g}" if isinstance(x, float) else str(x) for x in values.tolist()) + "]"
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    some = [True] * len(values) if there is None else there.tolist()
    rows = (
        ", ".join(f"{x + 0.0:.7g}" if on else "_" for x, on in zip(row, ons, strict=True)) if present else ""
        for row, ons, present in zip(values.tolist(), mask.tolist(), some, strict=True)
    )
    return "[" + ", ".join(f"[{row}]" for row in rows) + "]"


def show(loss: Loss, batch: Batch) -> str:
    """The batch as the loss sees it, a line a tensor; `_` marks what is masked."""
    plural = "" if len(batch) == 1 else "s"
    lines = [f"{batch.kind} batch of {len(batch)} example{plural} (`_` is masked):"]
    for i, part in enumerate(parts_of(loss)):
        there = batch.rows["sizes"] > i if batch.kind == Kind.LISTED else None
        for role, tensors in batch.tokens.items():
            seen = {"policy": True, "ref": loss.wants_reference and part not in ("prompt", "gold")}
            seen |= {"old": loss.kind is Kind.GROUPED, "behavior": loss.wants_behavior, "weights": True}
            if seen.get(role, role in (*loss.stats, *loss.ref_stats)):
                lines.append(f"  {part + ' ' + role:<22}{numbers(tensors[part], batch.masks[part], there)}")
    rows = {} if loss.kind is Kind.PAIRED and not loss.wants_margin else given_rows(loss, batch)
    of_list = {"rewards": torch.arange(3) < batch.rows["sizes"][:, None]} if batch.kind == Kind.LISTED else {}
    lines += [f"  {name:<22}{numbers(values, of_list.get(name))}" for name, values in rows.items()]
    if loss.window_pass == "mismatched":
        lines.append(f"  {'collected':<22}{numbers(batch.collected)}")
    if batch.earlier and type(loss).advance is not Loss.advance:
        lines.append(f"  {batch.earlier} steps on the same batch came before")
    return "\n".join(lines)
