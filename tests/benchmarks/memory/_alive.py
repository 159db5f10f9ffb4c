"""Counts the bytes that torch has alive, and that autograd keeps, on a CPU."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def own_storages(model: nn.Module) -> set[int]:
    tensors = itertools.chain(model.parameters(), model.buffers())
    return {t.untyped_storage().data_ptr() for p in tensors for t in (p, p.grad) if t is not None}


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Of the distinct storages that autograd keeps of a forward pass, the model's own aside."""
    own, kept = own_storages(model), {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    del out
    return sum(kept.values())


class Alive(TorchDispatchMode):
    """now, peak: bytes of the storages that operations have made and that are still there, the model's own aside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own, self.sizes = own_storages(model), {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes or storage.data_ptr() in self.own:
            return
        self.sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)
