"""The tile of `TwoGemm` on a GPU in one pass: a row is read once, and its gradient written but for a factor.

d log p_y / dz is e_y - p, and p is e^(z - s) / total for any shift s. With s = z_y, which lies in the row, the row's
entries can be written as they are read, before its total is known:

    T_v = e^(z_v - s), but T_y = -rest      rest = sum of the other T_v      factor = -c / (e^(z_y - s) + rest)

and factor T is the gradient, c (1 - p_y) at y among it, from a sum that leaves y out: no 1 is added and taken away. The
factor goes to the rows of the second product. bfloat16 has float32's range, so that the shift costs no digits; only
where some z is more than `RAISE` above it (p_y below e^-30) it is raised to that, and what is written already scaled.
Against two passes the tile is read once less: of 16 bytes a logit that both products and the kernel move, 12 are left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_logits import logits

RAISE: tl.constexpr = tl.constexpr(30.0)


@triton.jit
def once_kernel(  # type: ignore[no-untyped-def]
    tile,  # [n, stride] float32: raw logits without bias in the first `words` of each row
    bias,  # [words] or None
    targets,  # [n] int64
    logps,  # [n] float32; and the next three too, or None
    entropy,
    log_z,
    log_sum_p2,
    is_top1,  # [n] bool or None
    c,  # [n] float32: dL / d logps
    factor,  # [n] float32
    words,
    stride,
    inner,
    outer,
    slope,
    SOFTCAP: tl.constexpr,
    SUPPORT: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `_row_kernel`, of `c` alone."""
    t = tl.program_id(0).to(tl.int64)  # t * stride may exceed 2^31
    row = tile + t * stride
    gradient = row.to(tl.pointer_type(OUT), bitcast=True)
    y = tl.load(targets + t)
    lane = tl.arange(0, BLOCK)
    z_y, bend_y = logits(row, bias, words, stride, y, inner, outer, SOFTCAP, SUPPORT)

    shift, biggest, before_y = z_y, -1e38, -1e38
    rest, rest_ez, rest_e2 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, words, BLOCK):
        at = start + lane
        z, bend = logits(row, bias, words, stride, at, inner, outer, SOFTCAP, SUPPORT)
        top = tl.max(z, 0)
        if is_top1 is not None:
            if (y >= start) & (y < start + BLOCK):  # the largest of those before y
                before_y = tl.maximum(biggest, tl.max(tl.where(at < y, z, -1e38), 0))
        biggest = tl.maximum(biggest, top)
        if top - shift > RAISE:
            scale = tl.exp(shift - top)
            rest_ez = scale * (rest_ez + (shift - top) * rest)
            rest_e2 = scale * scale * rest_e2
            rest = scale * rest
            shift = top
            tl.debug_barrier()
            for earlier in range(0, start, BLOCK):
                place = gradient + earlier + lane
                tl.store(place, (tl.load(place).to(tl.float32) * scale).to(OUT))
        shifted = z - shift
        e = tl.where(at == y, 0.0, tl.exp(shifted))
        rest += e
        if entropy is not None:  # e is 0 where z is -1e38
            rest_ez += e * shifted
        if log_sum_p2 is not None:
            rest_e2 += e * e
        if SOFTCAP:
            e *= bend
        # in half precision block k lies over raw block k // 2: see the barrier of `_row_kernel`
        tl.debug_barrier()
        tl.store(gradient + at, e.to(OUT), mask=at < stride)

    others, own = tl.sum(rest, 0), tl.exp(z_y - shift)
    total = own + others
    log_total, over_total = tl.log(total), tl.div_rn(1.0, total)
    tl.store(logps + t, z_y - shift - log_total)
    tl.store(factor + t, -tl.load(c + t) * slope * over_total)
    if entropy is not None:
        tl.store(entropy + t, log_total - (tl.sum(rest_ez, 0) + own * (z_y - shift)) * over_total)
    if log_z is not None:
        tl.store(log_z + t, shift + log_total)
    if log_sum_p2 is not None:
        tl.store(log_sum_p2 + t, tl.log(tl.sum(rest_e2, 0) + own * own) - 2.0 * log_total)
    if is_top1 is not None:  # the first of the largest
        tl.store(is_top1 + t, (z_y == biggest) & (z_y > before_y))
    if SOFTCAP:
        others *= bend_y
    tl.debug_barrier()  # or the block that y lies in could be written behind it
    tl.store(gradient + y, (-others).to(OUT))
