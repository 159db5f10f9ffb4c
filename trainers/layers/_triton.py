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


@triton.jit
def _rotate_heads(  # type: ignore[no-untyped-def]
    x,
    y,
    row,
    at,
    length,
    heads,
    x_row,
    x_head,
    x_at,
    c1,
    c2,
    s1,
    s2,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BACK: tl.constexpr,
):
    """All heads of one token; y is laid out as [R, L, heads, D]."""
    half: tl.constexpr = D // 2
    head = tl.arange(0, HEADS)[:, None]
    inside = head < heads
    place = tl.arange(0, half)[None, :]
    first = x + row * x_row + at * x_at + head * x_head + place
    a = tl.load(first, mask=inside).to(tl.float32)
    b = tl.load(first + half, mask=inside).to(tl.float32)
    if BACK:
        ya, yb = a * c1 + b * s2, b * c2 - a * s1
    else:
        ya, yb = a * c1 - b * s1, b * c2 + a * s2
    out = y + ((row * length + at) * heads + head) * D + place
    tl.store(out, ya, mask=inside)
    tl.store(out + half, yb, mask=inside)


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    q, k, q_out, k_out, cos, sin, length, cs_row,
    q_heads, q_row, q_head, q_at,
    k_heads, k_row, k_head, k_at,
    D: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, at = token // length, token % length
    half: tl.constexpr = D // 2
    place = row * cs_row + at * D + tl.arange(0, half)[None, :]
    c1, c2 = tl.load(cos + place).to(tl.float32), tl.load(cos + place + half).to(tl.float32)
    s1, s2 = tl.load(sin + place).to(tl.float32), tl.load(sin + place + half).to(tl.float32)
    _rotate_heads(q, q_out, row, at, length, q_heads, q_row, q_head, q_at, c1, c2, s1, s2, D, Q_HEADS, BACK)
    _rotate_heads(k, k_out, row, at, length, k_heads, k_row, k_head, k_at, c1, c2, s1, s2, D, K_HEADS, BACK)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """See `rope.rotate`; back: the gradients. What comes out is laid out as [R, L, heads, D], as projections are."""
    rows, _, length, size = query.shape
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    cos, sin = cos.contiguous(), sin.contiguous()
    outs, sizes = [], []
    for x in (query, key):
        heads = x.shape[1]
        strides = (length * heads * size, size, heads * size, 1)
        outs.append(torch.empty_strided((rows, heads, length, size), strides, dtype=x.dtype, device=x.device))
        sizes += [heads, x.stride(0), x.stride(1), x.stride(2)]
    with torch.cuda.device_of(query):
        _rotate_kernel[(rows * length,)](
            query,
            key,
            *outs,
            cos,
            sin,
            length,
            length * size if cos.shape[0] > 1 else 0,
            *sizes,
            D=size,
            Q_HEADS=triton.next_power_of_2(query.shape[1]),
            K_HEADS=triton.next_power_of_2(key.shape[1]),
            BACK=back,
            num_warps=4,
        )
    return outs[0], outs[1]
