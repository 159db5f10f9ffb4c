"""The tile of `TwoGemm` on a GPU: one Triton kernel makes a row's statistics and overwrites it with its gradient.

Only `logps.py` imports this file, and only when it is about to use it: everything else in `losses/` needs torch alone.

One program takes one row. Its first pass over the raw logits x keeps a running max and the sums over e^(z - max) that
the statistics need; its second pass reads the row again and writes the gradient over it. The transform from x to z is
applied on the way in both, so that the tile is read twice and written once, and nothing of the tile's size is made
beside it. One pass does without a gradient, or where a factor of each row may be left out of one in bfloat16, which
takes half the tile's memory besides (`_triton_once.py`).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from . import _triton_once
from ._tile import STAT_DTYPES, STATS, Coefficients, Rows, Transform, product_dtype
from ._triton_logits import logits
from .support import Kept

BLOCK = 4096
"""Words of a row that a program holds at a time; a power of 2."""
ALIGNMENT = 16
"""Rows begin at multiples of so many words, so that the kernel and cuBLAS read whole vectors whatever V is."""
LAUNCH = {"num_warps": 16, "num_stages": 1, "enable_fp_fusion": False}
"""No fusion: as one fma z - max would not be 0 at the max, which is rounded, but |z| 2^-24."""
HALF = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]
    tile,  # [n, stride] float32: raw logits without bias in the first `words` of each row
    bias,  # [words] or None
    targets,  # [n] int64
    logps,  # [n] float32; and the next three too, or None
    entropy,
    log_z,
    log_sum_p2,
    is_top1,  # [n] bool or None
    c,  # [n] float32: see `Coefficients`
    log_z_c,  # the same or None, and the next two too
    entropy_c,
    entropy_given,
    words,
    stride,
    inner,  # z = outer tanh(inner (x + bias)) with SOFTCAP, else inner (x + bias)
    outer,
    slope,  # dz / dx at x = 0
    SOFTCAP: tl.constexpr,
    SUPPORT: tl.constexpr,
    OUT: tl.constexpr,  # dtype of the gradient
    BLOCK: tl.constexpr,
):
    """Statistics of one row, and its gradient, in OUT, from the beginning of the row's own memory on."""
    t = tl.program_id(0).to(tl.int64)  # t * stride may exceed 2^31
    row = tile + t * stride
    y = tl.load(targets + t)
    lane = tl.arange(0, BLOCK)

    biggest = -1e38  # not -inf: inf - inf and 0 * inf would be NaN
    total, sum_ez, sum_e2, z_y, before_y = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, words, BLOCK):
        z, _ = logits(row, bias, words, stride, start + lane, inner, outer, SOFTCAP, SUPPORT)
        before = biggest
        biggest = tl.maximum(before, tl.max(z, 0))
        shift = before - biggest
        scale = tl.exp(shift)
        e = tl.exp(z - biggest)
        if entropy is not None:  # sum of e (z - max), and what it becomes under another max
            sum_ez = scale * (sum_ez + shift * total) + tl.sum(e * (z - biggest), 0)
        if log_sum_p2 is not None:
            sum_e2 = scale * scale * sum_e2 + tl.sum(e * e, 0)
        total = scale * total + tl.sum(e, 0)
        if (y >= start) & (y < start + BLOCK):
            z_y = tl.sum(tl.where(start + lane == y, z, 0.0), 0)
            if is_top1 is not None:  # the largest of those before y
                before_y = tl.maximum(before, tl.max(tl.where(start + lane < y, z, -1e38), 0))
    log_total = tl.log(total)
    over_total = tl.div_rn(1.0, total)  # `/` is an approximation, seen in 1 - p where p is near 1
    tl.store(logps + t, z_y - biggest - log_total)
    if entropy is not None:
        tl.store(entropy + t, log_total - sum_ez * over_total)
    if log_z is not None:
        tl.store(log_z + t, biggest + log_total)
    if log_sum_p2 is not None:
        tl.store(log_sum_p2 + t, tl.log(sum_e2) - 2.0 * log_total)
    if is_top1 is not None:  # the first of the largest
        tl.store(is_top1 + t, (z_y == biggest) & (z_y > before_y))

    of_y = tl.load(c + t) * slope
    of_p = of_y
    if log_z_c is not None:
        of_p -= tl.load(log_z_c + t) * slope
    if entropy_c is not None:
        of_entropy = tl.load(entropy_c + t) * slope
        h_minus_log_total = tl.load(entropy_given + t) - log_total
    gradient = row.to(tl.pointer_type(OUT), bitcast=True)
    for start in range(0, words, BLOCK):
        at = start + lane
        z, bend = logits(row, bias, words, stride, at, inner, outer, SOFTCAP, SUPPORT)
        shifted = z - biggest
        p_weight = of_p
        if entropy_c is not None:
            p_weight += of_entropy * (shifted + h_minus_log_total)
        # e_y - p in float32, before the cast: rounded one by one they would cancel where p_y is near 1
        g = tl.where(at == y, of_y, 0.0) - tl.exp(shifted) * over_total * p_weight
        if SOFTCAP:
            g *= bend
        # In half precision block k goes to bytes [2kB, 2(k+1)B) of the row: over raw block k // 2, which iteration
        # k // 2 <= k has read. But each warp reads and writes its own part of a block in its own time: without
        # this barrier one that runs ahead would write over what another has still to read, of block 0 in
        # iteration 0 or of block k // 2 when it is iterations behind. Past the barrier of iteration k all warps
        # have read blocks 0 to k (and have done with the first pass), and nothing later than k is written. A load
        # that is moved up, as a pipeline does, finds the same raw values: a block is written over only after the
        # barrier that follows its load; a store that is moved down meets no load of its place.
        tl.debug_barrier()
        tl.store(gradient + at, g.to(OUT), mask=at < stride)


class TritonTile:
    """A `Tile` in one float32 buffer, whatever is asked of it; the gradient comes in the dtype of the head's weight.

    In half precision that is the front half of each row, a view [n, V] of row stride 2V, which the next product takes
    as it is; if it may be lazy a buffer of its own. Needs CUDA tensors, or Triton's interpreter (TRITON_INTERPRET=1
    before the first import) on a CPU.
    """

    sum_dtype = torch.float32

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        transform: Transform,
        rows: int,
    ):
        if weight.dtype == torch.float64:
            raise TypeError("impl='triton' computes in float32, for float64 use impl='two_gemm'")
        if not weight.is_cuda and isinstance(_row_kernel, triton.JITFunction):
            raise ValueError(f"impl='triton' needs CUDA tensors, got {weight.device}")
        self.weight = weight.to(product_dtype(weight))
        self.bias = None if bias is None else bias.contiguous()
        self.softcap = transform.softcap is not None
        self.slope = transform.logit_scale / transform.temperature
        self.inner, self.outer = self.slope, 1.0
        if transform.softcap is not None:
            self.inner = transform.logit_scale / transform.softcap
            self.outer = transform.softcap / transform.temperature
        self.words, self.stride = len(weight), -(-len(weight) // ALIGNMENT) * ALIGNMENT
        self._logits = weight.new_empty(rows, self.stride, dtype=torch.float32)
        self._gradient = self._logits.view(weight.dtype)
        self._lazy: Tensor | None = None

    def rows(
        self,
        h: Tensor,
        y: Tensor,
        kept: Kept | None,
        stats: Collection[str],
        coefficients: Coefficients | None,
        lazy: bool = False,
    ) -> Rows:
        """See `Tile`; the gradient is in the dtype of the weight that the tile was made with."""
        n, raw = len(h), self.multiply(h)
        if kept is not None:
            kept.leave_out(raw, -float("inf"))
        dtypes = dict.fromkeys(("logps", *stats), torch.float32) | {k: v for k, v in STAT_DTYPES.items() if k in stats}
        values = {name: h.new_empty(n, dtype=dtype) for name, dtype in dtypes.items()}
        shape = (self.words, self.stride, self.inner, self.outer, self.slope)
        flags = {"SOFTCAP": self.softcap, "SUPPORT": kept is not None}
        told = (self.bias, y.contiguous(), values["logps"], *(values.get(name) for name in STATS))
        gradient, factor = None, None
        with torch.cuda.device_of(self._logits):  # where Triton launches; a CPU tensor changes nothing
            if coefficients is None or (lazy and self._gradient.dtype == torch.bfloat16):
                c = None if coefficients is None else coefficients.c.contiguous()
                if c is not None:
                    factor = torch.empty_like(c, dtype=torch.float32)
                    if self._lazy is None:
                        self._lazy = torch.empty_like(self._logits, dtype=self._gradient.dtype)
                    gradient = self._lazy[:n, : self.words]
                options = flags | {"BLOCK": _triton_once.BLOCK} | _triton_once.LAUNCH
                _triton_once.once_kernel[(n,)](self._logits, gradient, *told, c, factor, *shape, **options)
            else:
                given = [None if x is None else x.contiguous() for x in coefficients]
                options = flags | {"OUT": self.out, "BLOCK": BLOCK} | LAUNCH
                _row_kernel[(n,)](self._logits, *told, *given, *shape, **options)
                gradient = self.gradient(n)
        return Rows(values.pop("logps"), values, gradient, factor)

    @property
    def out(self) -> tl.dtype:
        """Of the gradient, as kernels are told."""
        return HALF.get(self._gradient.dtype, tl.float32)

    def gradient(self, n: int) -> Tensor:
        """[n, V], what a kernel has written over the logits."""
        return self._gradient[:n, : self.words]

    def multiply(self, h: Tensor) -> Tensor:
        """[n, V] float32, the raw logits h [n, H] W^T; on a GPU not rounded to half precision on the way."""
        out = self._logits[: len(h), : self.words]
        if not h.is_cuda:
            out.copy_(linear(h, self.weight))
        elif h.dtype == torch.float32:
            torch.mm(h, self.weight.t(), out=out)
        else:  # cuBLAS accumulates in float32 and writes that: no half-precision tile beside this one
            torch.mm(h, self.weight.t(), out_dtype=torch.float32, out=out)
        return out
