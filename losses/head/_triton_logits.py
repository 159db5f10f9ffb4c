"""Logits on a GPU: from the head's raw output in a tile to z, on the way into a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """(tanh x, its slope 1 - tanh^2 x) of float32, each to some roundings of itself, and without overflow.

    With e = exp(-2|x|) the slope is 4 e / (1 + e)^2, also where tanh x is 1 in float32 and 1 - tanh^2 would be noise.
    tanh |x| = (1 - e) / (1 + e) cancels near 0: there it is the fifth convergent of its continued fraction.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    near = x * (945.0 + x2 * (105.0 + x2)) / (945.0 + x2 * (420.0 + x2 * 15.0))
    tanh = tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0, -far, far))
    return tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def logits(  # type: ignore[no-untyped-def]
    row, bias, words, stride, at, inner, outer, SOFTCAP: tl.constexpr, SUPPORT: tl.constexpr
):
    """(z, tanh's slope or z), [BLOCK] float32 each: the logits at the columns `at`, and how the soft cap bends them.

    The row's memory is read up to its stride, not to V, so that a V that no vector divides costs nothing; what is
    beyond V is of no value, and becomes a logit so low that it adds 0 to every sum, and no NaN. With SUPPORT so does a
    raw logit of -inf, a word that is left out (`support.OUTSIDE`).
    """
    x = tl.load(row + at, mask=at < stride, other=0.0)
    if bias is not None:
        x += tl.load(bias + at, mask=at < words, other=0.0).to(tl.float32)
    z = x * inner
    bend = z
    if SOFTCAP:
        tanh, bend = _tanh(z)
        z = tanh * outer
    if SUPPORT:
        z = tl.where(x == -float("inf"), -1e30, z)
    return tl.where(at < words, z, -1e38), bend
