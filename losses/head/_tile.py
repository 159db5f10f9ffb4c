"""A tile: one chunk of the LM head's logits, its row statistics, and its gradient in its own place.

`TorchTile` is made of torch operations, for any device; `_triton.TritonTile` takes its place on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from .support import OUTSIDE, Kept

STATS = ("entropy", "log_z", "log_sum_p2", "is_top1")
"""Row statistics that come with the log-probabilities on request."""
CONSTANTS = ("log_sum_p2", "is_top1")
"""Those without a gradient."""
STAT_DTYPES = {"is_top1": torch.bool}
"""Of those that are no numbers."""
SCRATCH = {"cpu": 262_144, "cuda": 16_777_216}
"""Logits that `TorchTile` works on at a time: 1 MiB in float32 on a CPU (measured), 64 MiB where launches cost more."""


class Transform(NamedTuple):
    """From the head's raw output x to the logits z = softcap tanh(logit_scale x / softcap) / temperature."""

    temperature: float
    logit_scale: float
    softcap: float | None

    def __call__(self, raw: Tensor) -> Tensor:
        """The logits z, out of place and differentiable; `raw` in at least float32."""
        z = raw * self.logit_scale if self.logit_scale != 1.0 else raw
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature if self.temperature != 1.0 else z


class Coefficients(NamedTuple):
    """[n] each: by what a loss weighs the rows, dL / d logps, dL / d log_z and dL / d entropy, None where it does not.

    entropy: the value, in nats, known from the forward pass; needed where entropy_c is.
    """

    c: Tensor
    log_z_c: Tensor | None = None
    entropy_c: Tensor | None = None
    entropy: Tensor | None = None

    def at(self, rows: slice) -> Coefficients:
        """Those of some of the rows."""
        return Coefficients(self.c[rows], *(None if x is None else x[rows] for x in self[1:]))


class Rows(NamedTuple):
    """What a tile tells of n rows: logps [n] in nats, each of the asked stats [n], the gradient [n, V] or None.

    factor: [n], by which the rows of the gradient are still to be multiplied, None: by nothing.
    """

    logps: Tensor
    stats: dict[str, Tensor]
    gradient: Tensor | None
    factor: Tensor | None = None


class Tile(Protocol):
    """One chunk of logits at a time, made and used up by a single call.

    weight: [V, H], what is multiplied, in the dtype in which it is. sum_dtype: of sums over rows or words.
    """

    weight: Tensor
    sum_dtype: torch.dtype

    def rows(
        self,
        h: Tensor,
        y: Tensor,
        kept: Kept | None,
        stats: Collection[str],
        coefficients: Coefficients | None,
        lazy: bool = False,
    ) -> Rows:
        """The rows of h [n, H], in weight's dtype, at the targets y [n]; with coefficients also their gradient.

        kept: the words that the rows are of, None: all. lazy: there may be a `factor`; of coefficients c alone.

        gradient: d sum_t (c log p + log_z_c log Z + entropy_c H)_t / d raw logits, in memory that the next call uses.
        Not together: the entropy among `stats` and a coefficient of it.
        """


def product_dtype(weight: Tensor) -> torch.dtype:
    """What to multiply in. In half precision a CPU takes 2 to 200 times float32's time: there copying W pays."""
    return torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else weight.dtype


class Block(NamedTuple):
    """The softmax of some rows of a tile. y: [b, 1], the targets. e: [b, V] exp(shifted), over the logits.

    shifted: [b, V] z - largest, in memory that the next block uses; of a word outside of the support -1, with e = 0.
    total: [b], the sum of e, as are e_y of the target and others of all else, with the digits that 1 + others loses.
    """

    y: Tensor
    largest: Tensor
    shifted: Tensor
    e: Tensor
    e_y: Tensor
    others: Tensor
    total: Tensor
    log_total: Tensor
    shifted_y: Tensor


class Logits:
    """One chunk of logits at a time, in one buffer that the next chunk uses again.

    block: rows to work on at a time after the product, `SCRATCH` logits: what is made of a row besides is then small,
    and on a CPU stays in the cache from the first pass over it to the last.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, transform: Transform, rows: int):
        self.sum_dtype = torch.promote_types(weight.dtype, torch.float32)
        dtype = product_dtype(weight)
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.factor = transform.logit_scale / transform.temperature
        self.transform = transform
        self._logits = weight.new_empty(rows, len(weight), dtype=self.sum_dtype)
        self.block = 1 + SCRATCH.get(weight.device.type, SCRATCH["cuda"]) // (1 + len(weight))
        softcapped = transform.softcap is not None
        self._slope = torch.empty_like(self._logits[: self.block]) if softcapped else None

    def multiply(self, h: Tensor) -> Tensor:
        """[n, V], the raw logits of h [n, H]."""
        z = self._logits[: len(h)]
        if self.weight.dtype != z.dtype and h.is_cuda:  # cuBLAS sums in float32: no need to round on the way here
            torch.mm(h, self.weight.t(), out_dtype=z.dtype, out=z)
            if self.bias is not None:
                z += self.bias
        elif self.weight.dtype != z.dtype:
            z.copy_(linear(h, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(h, self.weight.t(), out=z)
        else:
            torch.addmm(self.bias, h, self.weight.t(), out=z)
        return z

    def into_logits(self, z: Tensor, *, differentiated: bool) -> Tensor | None:
        """Raw logits become logits, in place; returns tanh's slope [b, V] where there is one that will be needed."""
        softcap, slope = self.transform.softcap, None
        if softcap is None:
            if self.factor != 1.0:
                z *= self.factor
            return None
        z.mul_(self.transform.logit_scale / softcap).tanh_()
        if differentiated and self._slope is not None:
            slope = torch.mul(z, z, out=self._slope[: len(z)]).neg_().add_(1.0)
        z *= softcap / self.transform.temperature
        return slope


class TorchTile(Logits):
    """A `Tile` of torch operations."""

    def __init__(self, weight: Tensor, bias: Tensor | None, transform: Transform, rows: int):
        super().__init__(weight, bias, transform, rows)
        self._scratch = torch.empty_like(self._logits[: self.block])

    def rows(
        self,
        h: Tensor,
        y: Tensor,
        kept: Kept | None,
        stats: Collection[str],
        coefficients: Coefficients | None,
        lazy: bool = False,
    ) -> Rows:
        """See `Tile`; the gradient is in sum_dtype, and whole."""
        z = self.multiply(h)
        logps = z.new_empty(len(h))
        values = {name: z.new_empty(len(h), dtype=STAT_DTYPES.get(name, z.dtype)) for name in stats}
        for start in range(0, len(h), self.block):
            at = slice(start, start + self.block)
            slope = self.into_logits(z[at], differentiated=coefficients is not None)
            own = None if kept is None else kept.at(at)
            block = self._softmax(z[at], y[at, None], own)
            logps[at] = block.shifted_y - block.log_total
            for name in _STATS:
                if name in values:
                    values[name][at] = _STATS[name](block)
            if coefficients is not None:
                _into_gradient(block, self.factor, *coefficients.at(at))
                if slope is not None:
                    z[at] *= slope
        return Rows(logps, values, None if coefficients is None else z)

    def _softmax(self, z: Tensor, y: Tensor, kept: Kept | None) -> Block:
        if kept is not None:
            kept.leave_out(z, OUTSIDE)
        largest = z.amax(-1, keepdim=True)
        shifted = torch.sub(z, largest, out=self._scratch[: len(z)])
        if kept is not None:  # a CPU takes 15 times as long for an exp that underflows
            kept.leave_out(shifted, -1.0)
        e = torch.exp(shifted, out=z)
        if kept is not None:
            kept.leave_out(e, 0.0)
        e_y = e.gather(1, y)
        others = e.scatter_(1, y, 0.0).sum(-1)
        e.scatter_(1, y, e_y)
        e_y = e_y[:, 0]
        total = e_y + others
        log_total = torch.where(e_y == 1.0, others.log1p(), total.log())
        return Block(y, largest[:, 0], shifted, e, e_y, others, total, log_total, shifted.gather(1, y)[:, 0])


def _entropy(x: Block) -> Tensor:
    """-sum_v p log p = log(total) - sum_v p shifted, which it uses up; e = 0 meets a finite number."""
    return x.log_total - x.shifted.mul_(x.e).sum(-1) / x.total


def _is_top1(x: Block) -> Tensor:
    """Whether y is the first of the largest. Only where p_y is 1/2 at most can another be as large."""
    top = x.shifted_y == 0
    rows = (top & (x.total >= 2)).nonzero()[:, 0]
    top[rows] = x.shifted[rows].argmax(-1) == x.y[rows, 0]
    return top


_STATS: dict[str, Callable[[Block], Tensor]] = {
    "is_top1": _is_top1,
    "log_z": lambda x: x.largest + x.log_total,
    # the largest e is 1: nothing to underflow
    "log_sum_p2": lambda x: 2 * (torch.linalg.vector_norm(x.e, dim=-1).log() - x.log_total),
    "entropy": _entropy,  # the last, for what it does to `shifted`
}


def _into_gradient(
    x: Block, factor: float, c: Tensor, log_z_c: Tensor | None, entropy_c: Tensor | None, entropy: Tensor | None
) -> None:
    """Turn `e` into d sum_t (c log p + log_z_c log Z + entropy_c H)_t / d raw logits, but for tanh's slope.

    Of word v it is c [v = y] - p_v (c + beside_v), beside_v = entropy_c (log p_v + H) - log_z_c, times the factor. That
    of y is formed by itself, with 1 - p_y = others / total: as a difference it would cancel where p_y is near 1, as
    would `W[y] - p @ W`.
    """
    c = c * factor
    beside = torch.zeros_like(c) if log_z_c is None else -log_z_c * factor
    beside_y = beside
    if entropy_c is None or entropy is None:
        x.e.mul_((-(c + beside) / x.total)[:, None])
    else:
        of_entropy = x.shifted.add_((entropy - x.log_total)[:, None]).mul_((entropy_c * factor)[:, None])
        beside_y = beside + of_entropy.gather(1, x.y)[:, 0]
        x.e.mul_(of_entropy.add_((c + beside)[:, None])).mul_((-1 / x.total)[:, None])
    x.e.scatter_(1, x.y, ((c * x.others - x.e_y * beside_y) / x.total)[:, None])
