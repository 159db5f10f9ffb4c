"""Triton kernels of elementwise layers; only imported where there is a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of one program; a power of 2."""
LAUNCH = {"num_warps": 4}


@triton.jit
def _swiglu_kernel(gate, up, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    tl.store(out + at, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit
def _swiglu_gradients_kernel(dy, gate, up, d_gate, d_up, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d = tl.load(dy + at, mask=inside).to(tl.float32)
    g = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(d_gate + at, d * u * s * (1.0 + g * (1.0 - s)), mask=inside)
    tl.store(d_up + at, d * g * s, mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `swiglu.product`."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        _swiglu_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK, **LAUNCH)
    return out


def swiglu_gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See `swiglu.gradients`."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    grid = (triton.cdiv(gate.numel(), BLOCK),)
    with torch.cuda.device_of(gate):
        _swiglu_gradients_kernel[grid](dy, gate, up, d_gate, d_up, gate.numel(), BLOCK=BLOCK, **LAUNCH)
    return d_gate, d_up
