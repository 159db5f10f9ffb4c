"""What autograd keeps for the backward pass: of a step's memory the part that grows with its tokens.

On a CPU it stands in for the peak, which there is not to be had: see `clock.peak_mem`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Saved:
    """now, peak_bytes: of the distinct storages that graphs hold, those of the models' own weights aside."""

    def __init__(self, *models: Any) -> None:
        own = (t for model in models if model is not None for t in (*model.parameters(), *model.buffers()))
        self.own = {t.untyped_storage().data_ptr() for t in own}
        self.held: Counter[int] = Counter()
        self.now = self.peak_bytes = 0

    def pack(self, tensor: Tensor) -> Held:
        held, storage = Held(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.own:
            self.now += size * (not self.held[place])
            self.held[place] += 1
            self.peak_bytes = max(self.peak_bytes, self.now)
            weakref.finalize(held, self.drop, place, size)
        return held

    def drop(self, place: int, size: int) -> None:
        self.held[place] -= 1
        self.now -= size * (not self.held[place])


class Held:
    """A tensor that a graph keeps; gone when the graph is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_mib(work: Callable[[], Any], *models: Any) -> float:
    """MiB that autograd keeps at the worst moment of `work`, whose models' weights do not count; a model may be None.

    Gradient checkpointing holds what it holds elsewhere: it is not seen.
    """
    saved = Saved(*models)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        work()
    return saved.peak_bytes / 2**20
