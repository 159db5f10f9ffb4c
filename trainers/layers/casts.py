"""Adapters in the dtype of their layers' inputs, side by side where layers share an input: made once in a step.

Every pass of a step computes with the same adapters: the forward and the backward pass of each micro-batch, and those
that checkpointing repeats. Casting and stacking them anew in each is a kernel apiece for next to no work, and a GPU
waits for the launches: of a 0.5B model a fifth of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Key = tuple[torch.dtype, tuple[int, ...]]
# Each with the weights that it is of, so that none of their ids is given to another while it is here.
Kept = dict[Key, tuple[tuple[Tensor, ...], Tensor]]


class _Step:
    """kept: inside `casts_kept`. A plain global, since a GPU's backward pass runs in a thread of its own."""

    kept: Kept | None = None


@contextlib.contextmanager
def casts_kept() -> Iterator[None]:
    """Inside, `stacked` makes each cast once. Weights must not change inside."""
    before, _Step.kept = _Step.kept, {}
    try:
        yield
    finally:
        _Step.kept = before


def stacked(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[sum of n_i, ...] of weights [n_i, ...], in this dtype; without a graph."""
    if len(weights) == 1 and weights[0].dtype is dtype:
        return weights[0]
    kept = _Step.kept
    if kept is None:
        return _made(weights, dtype)
    key = (dtype, tuple(map(id, weights)))
    if key not in kept:
        kept[key] = tuple(weights), _made(weights, dtype)
    return kept[key][1]


@torch.no_grad()
def _made(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    whole = torch.cat(tuple(weights)) if len(weights) > 1 else weights[0]
    return whole.to(dtype)
