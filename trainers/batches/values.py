"""What a model has said of scored tokens, between packed batches and the completions that they hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress

import torch
from torch import Tensor

from ..data.examples import Example
from .packing import PackedBatch


def laid_out(batch: PackedBatch, scored_values: Sequence[Tensor]) -> Tensor:
    """The scored values of each of its completions, from the CPU, as [paths, T, ...] on its device; zeros for a
    filler."""
    first = scored_values[0]
    out = torch.zeros(*batch.scored.shape, *first.shape[1:], dtype=first.dtype)
    if not batch.is_filler:
        for path, (c, values) in enumerate(zip(batch.completions, scored_values, strict=True)):
            scored = torch.tensor(c.mask, dtype=torch.bool)[: out.shape[1]]  # beyond that nothing is, of any completion
            out[path, : len(scored)][scored] = values
    return out.to(batch.scored.device, non_blocking=True)


def per_example(batch: PackedBatch, values: Tensor) -> Iterator[tuple[Example, list[Tensor]]]:
    """Every example with the scored values of each of its completions, copies on the CPU; none of a filler.

    values: [paths, T, ...] as `batch.scored`.
    """
    values, scored, path = values.cpu(), batch.scored.cpu(), 0
    for example in () if batch.is_filler else batch.examples:
        after = path + len(example.completions)
        yield example, [values[p, scored[p]] for p in range(path, after)]  # a mask makes a copy
        path = after


def by_completion(packed: Iterable[tuple[PackedBatch, Tensor]]) -> dict[int, Tensor]:
    """The scored values of every completion, by its id."""
    table: dict[int, Tensor] = {}
    for batch, values in packed:
        for example, parts in per_example(batch, values):
            table |= {id(c): own for c, own in zip(example.completions, parts, strict=True)}
    return table


def of_completions(batch: PackedBatch, table: Mapping[int, Tensor]) -> Tensor:
    """[paths, T, ...] on the batch's device: what `by_completion` has of those inside; a filler's need not be there."""
    none = next(iter(table.values()), torch.zeros(0))[:0]
    return laid_out(batch, [table.get(id(c), none) for c in batch.completions])


def repacked(packed: Iterable[tuple[PackedBatch, Tensor]], batches: Iterable[PackedBatch]) -> list[Tensor]:
    """[paths, T] of each of `batches`: the values that the same completions have in `packed`; none of nothing."""
    table = by_completion(packed)
    return [of_completions(batch, table) for batch in batches] if table else []


def behavior_of(batch: PackedBatch) -> Tensor | None:
    """[paths, T], the log-probabilities that the completions were sampled with; None where one has none."""
    if any(c.behavior is None for c in batch.completions):
        return None
    values = [torch.tensor(list(compress(c.behavior or (), c.mask))) for c in batch.completions]
    return laid_out(batch, values)
