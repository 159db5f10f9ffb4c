"""LoRA layers over packed weights while completions are sampled: no graph, few rows, few calls.

`lora_linear` is a node of autograd, and is told in every call what its layer is, since adapters, modes and weights
change while a model trains. While completions are sampled nothing of that does, and telling it is much of the time of
few rows: of SmolLM2-135M's on one thread a third for one row, an eighth for 32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import packed_weights as packed
from .lora_layers import FusedLora, part_of
from .lora_linear import Part


@contextlib.contextmanager
def packed_layers(model: nn.Module, rows: int) -> Iterator[None]:
    """`packed_weights` without gradient, and inside of it LoRA layers of one plain adapter in three products each.

    Adapters must not be changed inside. Switched to another, or off, a layer computes as it does outside.
    """
    changed: list[nn.Module] = []
    with packed.packed_weights(model, rows), torch.no_grad():
        try:
            for layer in model.modules() if rows else ():
                part = part_of(layer, torch.empty(0)) if isinstance(layer, FusedLora) else None
                if part is not None and packed.has_packed(part.base) and "forward" not in layer.__dict__:
                    layer.__dict__["forward"] = PackedLora(layer, part)
                    changed.append(layer)
            yield
        finally:
            for layer in changed:
                del layer.__dict__["forward"]


class PackedLora:
    """A layer's `forward`: x W^T + b + s (x A^T) B^T, in the order of `lora_linear`."""

    def __init__(self, layer: Any, part: Part) -> None:
        self.layer, self.own, self.active = layer, layer.forward, layer.active_adapter
        self.base, self.scaling = part.base.__dict__["forward"], part.scaling
        self.a, self.b = part.a.detach().t(), part.b.detach().t()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        width, layer = x.shape[-1], self.layer
        few = x.numel() <= packed.MOST_ROWS * width and x.dtype == torch.float32
        same = not layer.disable_adapters and layer.active_adapter == self.active
        if args or kwargs or not few or not same:
            return self.own(x, *args, **kwargs)  # type: ignore[no-any-return]
        y: Tensor = self.base(x)
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, width) @ self.a, self.b, alpha=self.scaling)
        return y
