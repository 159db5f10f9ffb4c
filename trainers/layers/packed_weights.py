"""Weights in the order in which a CPU multiplies few rows by them.

A product of 2 to 64 rows with a weight that lies in memory as it is trained costs about twice the reading of the
weight, because the library brings it into its kernel's order first, at every call: of SmolLM2-135M 97 ms a token for 4
rows, where one row takes 49. oneDNN takes weights that are brought into order once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

MOST_ROWS = 64
"""From here on the order of a weight is no longer what a product's time goes into."""
SMALLEST = 2**14
"""Elements of a weight that is worth a copy."""


@contextlib.contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside, float32 linear layers on a CPU multiply up to `MOST_ROWS` rows by reordered copies of their weights,
    which take the memory of these weights once more; those under LoRA adapters too, the adapters do not. rows: how many
    they will mostly be given; 0: nothing is changed.
    """
    changed: list[nn.Linear] = []
    try:
        # autocast decides in which dtype a layer multiplies, and a packed one would not ask
        wanted = rows and not torch.is_autocast_enabled("cpu") and available()
        for name, layer in model.named_modules() if wanted else ():
            adapter = ".lora_A." in name or ".lora_B." in name  # `lora_linear` takes their weights as they are
            if type(layer) is nn.Linear and not adapter and "forward" not in layer.__dict__ and fits(layer.weight):
                layer.__dict__["forward"] = Packed(layer, min(rows, MOST_ROWS))
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.__dict__["forward"]


def has_packed(layer: nn.Module) -> bool:
    """Whether the layer multiplies by a reordered copy of its weight, for whoever calls it instead of reading that."""
    return type(layer.__dict__.get("forward")) is Packed and not torch.is_grad_enabled()


def fits(weight: Tensor) -> bool:
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and type(weight.data) is Tensor
    return plain and weight.numel() >= SMALLEST


class Packed:
    """A layer's `forward` by a reordered copy of its weight."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        self.own, self.bias = layer.forward, layer.bias
        self.weight = reordered(layer.weight.detach(), rows)

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() > MOST_ROWS * x.shape[-1] or x.dtype != torch.float32:
            return self.own(x)  # type: ignore[no-any-return]
        return product(x, self.weight, self.bias)


def reordered(weight: Tensor, rows: int) -> Tensor:
    """For products of about so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)  # type: ignore[no-any-return]


def product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


@functools.cache
def available() -> bool:
    """Whether torch was built with oneDNN, and its products of this kind are right here."""
    if not torch.backends.mkldnn.is_available():
        return False
    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*shape, generator=draw) for shape in ((24, 40), (3, 1, 40)))
    try:
        return torch.allclose(product(x, reordered(weight, 3), None), linear(x, weight), rtol=1e-4, atol=1e-4)
    except Exception:  # another build of torch may not have it
        return False
