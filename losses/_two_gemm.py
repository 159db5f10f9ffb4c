"""Per-token log-probabilities in two matrix products, whatever the loss that follows.

d log p_t / d h_t = (e_y - p_t) W does not depend on the loss, and the backward pass of any loss of
log-probabilities only scales it, row by row, by c_t = dL / d log p_t. So the forward pass makes a tile of logits
(first product), overwrites it with e_y - p, multiplies it by W (second product) and keeps the result [N, H];
the backward pass is one elementwise product.

Where the head itself is trained, dW = sum_t c_t (e_y - p_t) h_t^T needs c_t before the rows are summed: there the
forward pass is one product and the backward pass makes the tiles again. The same holds for a gradient
through the entropy or through log Z.

Memory: one [chunk_tokens, V] tile in at least float32 for all chunks; one more with a soft cap that is
differentiated, one more with the entropy, and a half-precision copy of the tile for half-precision products.
`_triton.TritonTile`, which takes `TorchTile`'s place on a GPU, needs the one tile only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

STATS = ("entropy", "log_z", "log_sum_p2")
"""Row statistics that come with the log-probabilities on request; the last has no gradient."""


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
    """What a tile tells of n rows: logps [n] in nats, each of the asked stats [n], the gradient [n, V] or None."""

    logps: Tensor
    stats: dict[str, Tensor]
    gradient: Tensor | None


class Tile(Protocol):
    """One chunk of logits at a time, made and used up by a single call.

    weight: [V, H], what is multiplied, in the dtype in which it is. sum_dtype: of sums over rows or words.
    """

    weight: Tensor
    sum_dtype: torch.dtype

    def rows(self, h: Tensor, y: Tensor, stats: Collection[str], coefficients: Coefficients | None) -> Rows:
        """The rows of h [n, H], in weight's dtype, at the targets y [n]; with coefficients also their gradient.

        gradient: d sum_t (c log p + log_z_c log Z + entropy_c H)_t / d raw logits, in memory that the next call uses.
        Not together: the entropy among `stats` and a coefficient of it.
        """


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What to multiply in. In half precision a CPU takes 2 to 200 times float32's time: there copying W pays."""
    return torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else weight.dtype


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; in float32 on a GPU, where cuBLAS may cut a sum over V into parts, and add those in half precision."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, total in at least float32, without a second tensor of its size where the device can."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class TorchTile:
    """A `Tile` of torch operations: the softmax over one chunk's logits, in buffers that the next chunk uses again.

    After `_fill`: e [n, V] = exp(z - max), total [n] its row sums, logps [n] in nats; with `entropy` also a copy of
    z - max [n, V], which either of `_stat("entropy")` and `_gradient` uses up.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        transform: Transform,
        rows: int,
        *,
        entropy: bool,
        differentiated: bool,
    ):
        self.sum_dtype = torch.promote_types(weight.dtype, torch.float32)
        dtype = _product_dtype(weight)
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.factor = transform.logit_scale / transform.temperature
        self.transform = transform
        softcap = transform.softcap is not None
        shape = rows, len(weight)
        self._logits = weight.new_empty(shape, dtype=self.sum_dtype)
        self._shifted = weight.new_empty(shape, dtype=self.sum_dtype) if entropy else None
        self._slope = weight.new_empty(shape, dtype=self.sum_dtype) if softcap and differentiated else None

    def rows(self, h: Tensor, y: Tensor, stats: Collection[str], coefficients: Coefficients | None) -> Rows:
        """See `Tile`; the gradient is in sum_dtype."""
        self._fill(h, y)
        values = {name: self._stat(name) for name in stats}
        return Rows(self.logps, values, None if coefficients is None else self._gradient(*coefficients))

    def _fill(self, h: Tensor, y: Tensor) -> None:
        """Make the softmax of h [n, H] W^T and its statistics at the targets y [n]."""
        self.n, self.y = len(h), y[:, None]
        z = self._logits[: self.n]
        if self.weight.dtype != z.dtype:
            z.copy_(linear(h, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(h, self.weight.t(), out=z)
        else:
            torch.addmm(self.bias, h, self.weight.t(), out=z)
        self._transform(z)
        self.largest = z.amax(-1, keepdim=True)
        z -= self.largest
        z_y = z.gather(1, self.y)[:, 0]
        if self._shifted is not None:
            self.shifted = self._shifted[: self.n].copy_(z)
        self.e = z.exp_()
        self.total = self.e.sum(-1)
        self.log_total = self.total.log()
        self.logps = z_y - self.log_total

    def _transform(self, z: Tensor) -> None:
        softcap = self.transform.softcap
        if softcap is None:
            if self.factor != 1.0:
                z *= self.factor
            return
        z.mul_(self.transform.logit_scale / softcap).tanh_()
        if self._slope is not None:
            torch.mul(z, z, out=self._slope[: self.n]).neg_().add_(1.0)
        z *= softcap / self.transform.temperature

    def _stat(self, name: str) -> Tensor:
        """[n], one of `STATS`, before `_gradient`."""
        if name == "log_z":
            return self.largest[:, 0] + self.log_total
        if name == "log_sum_p2":  # the largest e is 1: nothing to underflow
            return 2 * (torch.linalg.vector_norm(self.e, dim=-1).log() - self.log_total)
        # the entropy, -sum_v p log p = log(total) - sum_v p (z - max); e = 0 meets a finite z - max
        return self.log_total - self.shifted.mul_(self.e).sum(-1) / self.total

    def _gradient(self, c: Tensor, log_z_c: Tensor | None, entropy_c: Tensor | None, entropy: Tensor | None) -> Tensor:
        """[n, V], d sum_t (c log p + log_z_c log Z + entropy_c H)_t / d raw logits, in place of `e`: once a `_fill`.

        It is c e_y - p (c - log_z_c + entropy_c (log p + H)), times the transform's slope. e_y - p must be formed here,
        in at least float32: as `W[y] - p @ W` it would cancel where p_y is near 1.
        """
        c = c * self.factor
        of_p = c if log_z_c is None else c - log_z_c * self.factor
        tile = self.e
        if entropy_c is None or entropy is None:
            tile *= (-of_p / self.total)[:, None]
        else:
            log_p_plus_h = self.shifted.add_((entropy - self.log_total)[:, None])
            tile *= log_p_plus_h.mul_((entropy_c * self.factor)[:, None]).add_(of_p[:, None])
            tile *= (-1 / self.total)[:, None]
        tile.scatter_add_(1, self.y, c[:, None])
        if self._slope is not None:
            tile *= self._slope[: self.n]
        return tile


class TwoGemm(torch.autograd.Function):
    """(hidden, weight, bias, targets, transform, make_tile, chunk_tokens, stats, grad) -> (logps [N], *stats [N] each).

    make_tile: the class of `Tile` to use.
    grad: whether gradients are being recorded (`torch.is_grad_enabled()`, which is always False inside `forward`).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: Transform,
        make_tile: Callable[..., Tile],
        chunk_tokens: int,
        stats: tuple[str, ...],
        grad: bool,
    ) -> tuple[Tensor, ...]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        recomputes = needs_weight or needs_bias
        keeps_g = grad and needs_hidden and not recomputes
        g = torch.empty_like(hidden) if keeps_g else None
        rows = min(chunk_tokens, len(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            tile = make_tile(weight, bias, transform, rows, entropy="entropy" in stats, differentiated=keeps_g)
            out = {name: hidden.new_empty(len(hidden), dtype=tile.sum_dtype) for name in ("logps", *stats)}
            of_logps = Coefficients(hidden.new_ones(len(hidden), dtype=tile.sum_dtype)) if keeps_g else None
            for start in range(0, len(hidden), chunk_tokens):
                at = slice(start, start + chunk_tokens)
                coefficients = None if of_logps is None else of_logps.at(at)
                got = tile.rows(hidden[at].to(tile.weight.dtype), targets[at], stats, coefficients)
                out["logps"][at] = got.logps
                for name in stats:
                    out[name][at] = got.stats[name]
                if g is not None:
                    assert got.gradient is not None
                    g[at] = _product(got.gradient.to(tile.weight.dtype), tile.weight)
        ctx.set_materialize_grads(False)
        again = recomputes or "entropy" in stats or "log_z" in stats
        ctx.save_for_backward(g, *((hidden, weight, bias, targets, out.get("entropy")) if again else ()))
        ctx.options = transform, make_tile, chunk_tokens, stats
        if "log_sum_p2" in stats:
            ctx.mark_non_differentiable(out["log_sum_p2"])
        return tuple(out.values())

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, *grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: what follows would silently count as a constant
            raise RuntimeError("no second derivative, use impl='eager' under create_graph=True")
        g, *inputs = ctx.saved_tensors
        grads = dict(zip(ctx.options[-1], grad_stats, strict=True))
        grads = {"logps": grad_logps, "log_z": grads.get("log_z"), "entropy": grads.get("entropy")}
        wanted = [name for name, value in grads.items() if value is not None]
        if not wanted:
            return (None,) * 9
        if g is not None and wanted == ["logps"]:
            return (g * grads["logps"][:, None]).to(g.dtype), *(None,) * 8  # type: ignore[index]
        with torch.autocast(inputs[0].device.type, enabled=False):
            return *_recompute(ctx, inputs, grads), *(None,) * 6


def _recompute(ctx: Any, inputs: list[Any], grads: dict[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, weight and bias from new tiles; sums over tokens are kept in at least float32."""
    hidden, weight, bias, targets, entropy = inputs
    transform, make_tile, chunk_tokens, _ = ctx.options
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    rows = min(chunk_tokens, len(hidden))
    tile = make_tile(weight, bias, transform, rows, entropy=grads["entropy"] is not None, differentiated=True)
    c = grads["logps"]
    if c is None:
        c = hidden.new_zeros(len(hidden), dtype=tile.sum_dtype)
    coefficients = Coefficients(c, grads["log_z"], grads["entropy"], entropy)
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=tile.sum_dtype) if needs_weight else None
    grad_bias = weight.new_zeros(len(weight), dtype=tile.sum_dtype) if needs_bias else None
    for start in range(0, len(hidden), chunk_tokens):
        at = slice(start, start + chunk_tokens)
        h = hidden[at].to(tile.weight.dtype)
        grad_logits = tile.rows(h, targets[at], (), coefficients.at(at)).gradient
        assert grad_logits is not None
        if grad_bias is not None:
            grad_bias += grad_logits.sum(0, dtype=grad_bias.dtype)
        grad_logits = grad_logits.to(tile.weight.dtype)
        if grad_hidden is not None:
            grad_hidden[at] = _product(grad_logits, tile.weight)
        if grad_weight is not None:
            _add_product(grad_weight, grad_logits.t(), h)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(weight.dtype),
    )
