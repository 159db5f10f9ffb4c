"""The tile of `TwoGemm` on a GPU in one pass: a row is read once, and its gradient written but for a factor.

d log p_y / dz is e_y - p, and p is e^(z - s) / total for any shift s. With s = z_y, which lies in the row, a row's
entries can be written as they are read, before its total is known:

    T_v = e^(z_v - s), but T_y = -rest      rest = sum of the other T_v      factor = -c / (e^(z_y - s) + rest)

and factor T is the gradient, c (1 - p_y) at y among it, from a sum that leaves y out: no 1 is added and taken away. The
factor goes to the rows of the second product. bfloat16 has float32's range, so that the shift costs no digits; a row
with some z more than `RAISE` above it (p_y below e^-8) is gone over again, with its largest z.

No word waits for another: each lane of a program keeps sums of its own, which are added up at the row's end. T has
memory of its own, half of the logits'; a running max, and gradients in the logits' own place, would make all of a
program's warps wait for one another at every block, which took longer than reading the memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_logits import logits

BLOCK = 1024
"""Words of a row that a program holds at a time; a power of 2."""
LAUNCH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
RAISE: tl.constexpr = tl.constexpr(8.0)
"""More would cost float32's last digits in the entropy, a difference of two such numbers."""


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    row, gradient, bias, words, stride, y, shift, inner, outer, entropy, log_sum_p2,
    SOFTCAP: tl.constexpr, SUPPORT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[BLOCK] each, over the words but y: the largest z, and the sums of e, e (z - shift) and e^2; writes T."""
    lane = tl.arange(0, BLOCK)
    biggest = tl.full([BLOCK], -1e38, tl.float32)
    rest, rest_ez, rest_e2 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, words, BLOCK):
        at = start + lane
        z, bend = logits(row, bias, words, stride, at, inner, outer, SOFTCAP, SUPPORT)
        z = tl.where(at == y, -1e38, z)
        biggest = tl.maximum(biggest, z)
        e = tl.exp(z - shift)
        rest += e
        if entropy is not None:  # e is 0 where z is -1e38
            rest_ez += e * (z - shift)
        if log_sum_p2 is not None:
            rest_e2 += e * e
        if gradient is not None:
            if SOFTCAP:
                e *= bend
            tl.store(gradient + at, e.to(gradient.dtype.element_ty), mask=at < stride)
    return biggest, rest, rest_ez, rest_e2


@triton.jit
def _largest_before(  # type: ignore[no-untyped-def]
    row, bias, words, stride, y, inner, outer, SOFTCAP: tl.constexpr, SUPPORT: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest z in front of y."""
    lane = tl.arange(0, BLOCK)
    biggest = tl.full([BLOCK], -1e38, tl.float32)
    for start in range(0, y, BLOCK):
        at = start + lane
        z, _ = logits(row, bias, words, stride, at, inner, outer, SOFTCAP, SUPPORT)
        biggest = tl.maximum(biggest, tl.where(at < y, z, -1e38))
    return tl.max(biggest, 0)


@triton.jit
def once_kernel(  # type: ignore[no-untyped-def]
    tile,  # [n, stride] float32: raw logits without bias in the first `words` of each row
    gradients,  # [n, stride] in the gradient's dtype, or None
    bias,  # [words] or None
    targets,  # [n] int64
    logps,  # [n] float32; and the next three too, or None
    entropy,
    log_z,
    log_sum_p2,
    is_top1,  # [n] bool or None
    c,  # [n] float32: dL / d logps; None without gradients
    factor,  # [n] float32, or None
    words,
    stride,
    inner,
    outer,
    slope,
    SOFTCAP: tl.constexpr,
    SUPPORT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of one row, and with `c` its T and factor."""
    t = tl.program_id(0).to(tl.int64)  # t * stride may exceed 2^31
    row = tile + t * stride
    gradient = None if gradients is None else gradients + t * stride
    y = tl.load(targets + t)
    z_y, bend_y = logits(row, bias, words, stride, y, inner, outer, SOFTCAP, SUPPORT)
    shift = z_y
    biggest, rest, rest_ez, rest_e2 = _sums(
        row, gradient, bias, words, stride, y, shift, inner, outer, entropy, log_sum_p2, SOFTCAP, SUPPORT, BLOCK
    )
    top = tl.max(biggest, 0)
    if top - shift > RAISE:
        shift = top
        tl.debug_barrier()  # what was written is written over
        biggest, rest, rest_ez, rest_e2 = _sums(
            row, gradient, bias, words, stride, y, shift, inner, outer, entropy, log_sum_p2, SOFTCAP, SUPPORT, BLOCK
        )
    others, own = tl.sum(rest, 0), tl.exp(z_y - shift)
    total = own + others
    log_total, over_total = tl.log(total), tl.div_rn(1.0, total)
    tl.store(logps + t, z_y - shift - log_total)
    if entropy is not None:
        tl.store(entropy + t, log_total - (tl.sum(rest_ez, 0) + own * (z_y - shift)) * over_total)
    if log_z is not None:
        tl.store(log_z + t, shift + log_total)
    if log_sum_p2 is not None:
        tl.store(log_sum_p2 + t, tl.log((tl.sum(rest_e2, 0) + own * own) * over_total * over_total))
    if is_top1 is not None:  # the first of the largest; few have an equal
        first = z_y > top
        if z_y == top:
            first = z_y > _largest_before(row, bias, words, stride, y, inner, outer, SOFTCAP, SUPPORT, BLOCK)
        tl.store(is_top1 + t, first)
    if gradient is not None:
        tl.store(factor + t, -tl.load(c + t) * slope * over_total)
        if SOFTCAP:
            others *= bend_y
        tl.debug_barrier()  # or the block that y lies in could be written behind it
        tl.store(gradient + y, (-others).to(gradient.dtype.element_ty))
