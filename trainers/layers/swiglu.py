"""SwiGLU, silu(gate) * up with silu(x) = x sigmoid(x), keeping gate and up alone for the backward pass.

    d gate = dy up s (1 + gate (1 - s))      d up = dy gate s      s = sigmoid(gate)

autograd keeps silu(gate) as well, and rounds it to the dtype on the way. On a GPU one kernel computes each direction,
and rounds once.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of two tensors of one shape and dtype."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return product(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True: what follows would silently count as a constant
            raise RuntimeError("no second derivative of fused layers; load the model with fused_layers=False")
        return gradients(dy, *ctx.saved_tensors)


def product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up without a graph."""
    kernels = triton_kernels() if gate.is_cuda else None
    return silu(gate) * up if kernels is None else kernels.swiglu(gate, up)


def gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up) of the product's gradient."""
    kernels = triton_kernels() if gate.is_cuda else None
    if kernels is not None:
        return kernels.swiglu_gradients(dy, gate, up)
    return torch.ops.aten.silu_backward(dy * up, gate), dy * silu(gate)


@functools.cache
def triton_kernels() -> ModuleType | None:
    """The kernels of these layers, where Triton is installed."""
    try:
        from . import _triton
    except ImportError:
        return None
    return _triton
