"""Triton's part of attention by sequences; only imported where there is a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batches.sequences import KeyLists


@triton.jit
def _sum_copies_kernel(dk, dv, dk_out, dv_out, copies, copies_of, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    begin, end = tl.load(copies_of + token), tl.load(copies_of + token + 1)
    k = tl.zeros((BLOCK,), tl.float32)
    v = tl.zeros((BLOCK,), tl.float32)
    for i in range(begin, end):
        place = tl.load(copies + i).to(tl.int64) * width + at
        k += tl.load(dk + place, mask=inside, other=0.0).to(tl.float32)
        v += tl.load(dv + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dk_out + token * width + at, k, mask=inside)
    tl.store(dv_out + token * width + at, v, mask=inside)


def sum_copies(dk: Tensor, dv: Tensor, lists: KeyLists) -> tuple[Tensor, Tensor]:
    """See `varlen.sum_copies`. dk, dv: [T', key heads, D]."""
    assert lists.copies is not None and lists.copies_of is not None
    dk, dv = dk.contiguous(), dv.contiguous()
    _, heads, size = dk.shape
    tokens, width = len(lists.copies_of) - 1, heads * size
    dk_out, dv_out = dk.new_empty(tokens, heads, size), dv.new_empty(tokens, heads, size)
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(dk):
        _sum_copies_kernel[(tokens,)](
            dk,
            dv,
            dk_out,
            dv_out,
            lists.copies,
            lists.copies_of,
            width,
            BLOCK=block,
            num_warps=min(8, max(1, block // 512)),
        )
    return dk_out, dv_out
