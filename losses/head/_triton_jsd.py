"""The tile of a divergence on a GPU: one Triton kernel makes a row's divergence, and its gradient over the row.

The formulas are those of `_jsd_tile.divergence`. One program takes one row of both models' logits: a first pass for
the two log-sum-exps, a second for the divergence and the mean that its gradient needs, a third for the gradient, in
place. So both tiles are read three times and one is written once, where torch's operations go over them twenty times.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._jsd_tile import MAX_LOG_RATIO, JsdTile
from ._tile import Coefficients, Rows
from ._triton import TritonTile
from ._triton_logits import logits
from .support import Kept

BLOCK = 2048
"""Words of both rows that a program holds at a time; a power of 2."""
LAUNCH = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
FORWARD, REVERSE, BETWEEN = 0, 1, 2  # by beta
LARGEST: tl.constexpr = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def _expm1(x):  # type: ignore[no-untyped-def]
    """e^x - 1, near 0 by its series, whose next term is a part in 10^8."""
    near = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8))))))
    return tl.where(tl.abs(x) < 0.5, x * near, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):  # type: ignore[no-untyped-def]
    """log(1 + x), x > -1: what 1 + x was rounded by is added to first order."""
    y = 1.0 + x
    return tl.log(y) + (x - (y - 1.0)) / y


@triton.jit
def _word(log_p, log_q, beta, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """(p, a word's part of the divergence, and what its gradient is made of) of log-probabilities."""
    p, q, s = tl.exp(log_p), tl.exp(log_q), log_q - log_p
    if KIND == 2:
        of_p = -_log1p(beta * _expm1(tl.minimum(s, LARGEST)))
        of_q = -_log1p((1.0 - beta) * _expm1(tl.minimum(-s, LARGEST)))
        of_p *= 1.0 - beta
        part = beta * q * of_q + p * of_p
    else:
        apart = tl.where(tl.abs(s) < 1.0, q * _expm1(-s), p - q)
        of_p = -s
        part = -(p * s + apart)
        if KIND == 0:
            of_p = apart
            part = q * s + apart
    return p, part, of_p


@triton.jit
def _totals(row, bias, words, stride, inner, outer, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(largest, log of the sum of e^(z - largest)) of a row's logits: one number would be rounded by the largest."""
    lane = tl.arange(0, BLOCK)
    biggest, total = -1e38, 0.0
    for start in range(0, words, BLOCK):
        z, _ = logits(row, bias, words, stride, start + lane, inner, outer, SOFTCAP, False)
        before = biggest
        biggest = tl.maximum(before, tl.max(z, 0))
        total = tl.exp(before - biggest) * total + tl.sum(tl.exp(z - biggest), 0)
    return biggest, tl.log(total)


@triton.jit
def jsd_kernel(  # type: ignore[no-untyped-def]
    tile,  # [n, stride] float32: the student's raw logits without bias in the first `words` of each row
    of_teacher,  # the same of the teacher
    bias,  # [words] or None
    teacher_bias,
    values,  # [n] float32
    c,  # [n] float32: by what a loss weighs the divergence; None without gradients
    words,
    stride,
    inner,  # see `_triton._row_kernel`
    outer,
    slope,
    teacher_inner,
    teacher_outer,
    beta,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    KIND: tl.constexpr,
    OUT: tl.constexpr,  # dtype of the gradient
    BLOCK: tl.constexpr,
):
    """The divergence of one row, and its gradient, in OUT, from the beginning of the student's row's own memory on."""
    t = tl.program_id(0).to(tl.int64)  # t * stride may exceed 2^31
    row, other = tile + t * stride, of_teacher + t * stride
    lane = tl.arange(0, BLOCK)
    top, total = _totals(row, bias, words, stride, inner, outer, SOFTCAP, BLOCK)
    teacher_top, teacher_total = _totals(
        other, teacher_bias, words, stride, teacher_inner, teacher_outer, TEACHER_SOFTCAP, BLOCK
    )
    value, mean = 0.0, 0.0
    for start in range(0, words, BLOCK):
        z, _ = logits(row, bias, words, stride, start + lane, inner, outer, SOFTCAP, False)
        w, _ = logits(
            other, teacher_bias, words, stride, start + lane, teacher_inner, teacher_outer, TEACHER_SOFTCAP, False
        )
        p, part, of_p = _word(z - top - total, w - teacher_top - teacher_total, beta, KIND)
        value += tl.sum(part, 0)
        mean += tl.sum(p * of_p, 0)
    tl.store(values + t, tl.maximum(value, 0.0))
    if c is not None:
        factor = tl.load(c + t) * slope
        gradient = row.to(tl.pointer_type(OUT), bitcast=True)
        for start in range(0, words, BLOCK):
            at = start + lane
            z, bend = logits(row, bias, words, stride, at, inner, outer, SOFTCAP, False)
            w, _ = logits(other, teacher_bias, words, stride, at, teacher_inner, teacher_outer, TEACHER_SOFTCAP, False)
            p, _, of_p = _word(z - top - total, w - teacher_top - teacher_total, beta, KIND)
            g = of_p if KIND == 0 else p * (of_p - mean)
            g *= factor
            if SOFTCAP:
                g *= bend
            tl.debug_barrier()  # as in `_triton._row_kernel`: what is written over has been read by all
            tl.store(gradient + at, g.to(OUT), mask=at < stride)


class TritonJsdTile(JsdTile):
    """The same in two float32 buffers, whatever is asked of it; the gradient comes in the dtype of the head's weight,
    as `TritonTile`'s does. Neither head may be in float64."""

    of_one = TritonTile

    def rows(
        self,
        h: Tensor,
        y: Tensor,
        kept: Kept | None,
        stats: Collection[str],
        coefficients: Coefficients | None,
        lazy: bool = False,
    ) -> Rows:
        """See `JsdTile`."""
        own, other, n = self.student, self.teacher, len(h)
        z, w = own.multiply(h), other.multiply(self.teacher_hidden[y].to(other.weight.dtype))
        values = h.new_empty(n, dtype=torch.float32)
        c = None if coefficients is None else coefficients.c.contiguous()
        shape = (own.words, own.stride, own.inner, own.outer, own.slope, other.inner, other.outer, self.beta)
        kind = FORWARD if self.beta == 0 else REVERSE if self.beta == 1 else BETWEEN
        flags = {"SOFTCAP": own.softcap, "TEACHER_SOFTCAP": other.softcap, "KIND": kind, "BLOCK": BLOCK}
        with torch.cuda.device_of(values):  # where Triton launches; a CPU tensor changes nothing
            jsd_kernel[(n,)](z, w, own.bias, other.bias, values, c, *shape, OUT=own.out, **flags, **LAUNCH)
        return Rows(values, {}, None if c is None else own.gradient(n))
