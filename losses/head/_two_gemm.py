"""Per-token log-probabilities in two matrix products, whatever the loss that follows.

d log p_t / d h_t = (e_y - p_t) W does not depend on the loss, and the backward pass of any loss of
log-probabilities only scales it, row by row, by c_t = dL / d log p_t. So the forward pass makes a tile of logits
(first product), overwrites it with e_y - p, multiplies it by W (second product) and keeps the result [N, H];
the backward pass is one elementwise product.

Where the head itself is trained, dW = sum_t c_t (e_y - p_t) h_t^T needs c_t before the rows are summed: there the
forward pass is one product and the backward pass makes the tiles again. The same holds for a gradient
through the entropy or through log Z.

Memory: one [chunk_tokens, V] tile in at least float32 for all chunks, whatever is asked for, and a half-precision copy
of it for half-precision products, which `_triton.TritonTile`, that takes `TorchTile`'s place on a GPU, does without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._tile import CONSTANTS, STAT_DTYPES, Coefficients, Rows, Tile, Transform
from .support import Kept


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; in float32 on a GPU, where cuBLAS may cut a sum over V into parts, and add those in half precision."""
    if not (a.is_cuda and a.dtype in (torch.bfloat16, torch.float16)):
        return a @ b
    processors = torch.cuda.get_device_properties(a.device).multi_processor_count
    return _in_parts(a, b, _parts(len(a), b.shape[0], b.shape[1], processors), out_dtype=torch.float32)


def _in_parts(a: Tensor, b: Tensor, count: int, **options: Any) -> Tensor:
    """a @ b, whose sum is cut into so many parts that are added up behind it. options: of torch's product."""
    if count == 1:
        return torch.mm(a, b, **options)
    parts = a.unflatten(1, (count, -1)).transpose(0, 1)
    return torch.bmm(parts, b.unflatten(0, (count, -1)), **options).sum(0)


def _parts(rows: int, words: int, width: int, processors: int) -> int:
    """In how many parts to cut the sum over the words of [rows, words] @ [words, width], whose result is too small to
    keep a GPU busy in blocks of 128 x 256. Each begins at a multiple of 16 bytes, as cuBLAS's fast kernels want it."""
    blocks = -(-rows // 128) * -(-width // 256)
    return max(n for n in (1, 2, 4, 8) if n == 1 or (n * blocks <= processors and words % (8 * n) == 0))


def _second_product(rows: Rows, weight: Tensor) -> Tensor:
    """[n, H], the gradient of the hidden states; of a function of its own, or it would live on beside the next tile."""
    assert rows.gradient is not None
    product = _product(rows.gradient.to(weight.dtype), weight)
    return product if rows.factor is None else product.mul_(rows.factor[:, None])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, total in at least float32, without a second tensor of its size where the device can."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _of(kept: Kept | None, at: slice) -> Kept | None:
    return None if kept is None else kept.at(at)


class TwoGemm(torch.autograd.Function):
    """(hidden, weight, bias, targets, kept, transform, make_tile, chunk_tokens, stats, grad) -> logps [N], *stats [N].

    make_tile: the class of `Tile` to use. Its `logps` may be any number of a row whose gradient it knows, and `targets`
    what it tells rows by: see `_jsd_tile.py`.
    grad: whether gradients are being recorded (`torch.is_grad_enabled()`, which is always False inside `forward`).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        kept: Kept | None,
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
            tile = make_tile(weight, bias, transform, rows)
            out = {
                name: hidden.new_empty(len(hidden), dtype=STAT_DTYPES.get(name, tile.sum_dtype))
                for name in ("logps", *stats)
            }
            of_logps = Coefficients(hidden.new_ones(len(hidden), dtype=tile.sum_dtype)) if keeps_g else None
            for start in range(0, len(hidden), chunk_tokens):
                at = slice(start, start + chunk_tokens)
                coefficients = None if of_logps is None else of_logps.at(at)
                # without a name, which would keep the copy beside the second product
                got = tile.rows(
                    hidden[at].to(tile.weight.dtype), targets[at], _of(kept, at), stats, coefficients, lazy=True
                )
                out["logps"][at] = got.logps
                for name in stats:
                    out[name][at] = got.stats[name]
                if g is not None:
                    g[at] = _second_product(got, tile.weight)
        ctx.set_materialize_grads(False)
        again = recomputes or "entropy" in stats or "log_z" in stats
        ctx.save_for_backward(g, *((hidden, weight, bias, targets, out.get("entropy")) if again else ()))
        ctx.options = kept, transform, make_tile, chunk_tokens, stats
        ctx.mark_non_differentiable(*(out[name] for name in CONSTANTS if name in stats))
        return tuple(out.values())

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, *grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: what follows would silently count as a constant
            raise RuntimeError("no second derivative, use impl='eager' under create_graph=True")
        g, *inputs = ctx.saved_tensors
        grads = dict(zip(ctx.options[-1], grad_stats, strict=True))
        grads = {"logps": grad_logps, "log_z": grads.get("log_z"), "entropy": grads.get("entropy")}
        wanted = [name for name, value in grads.items() if value is not None]
        none = (None,) * len(ctx.needs_input_grad)
        if not wanted:
            return none
        if g is not None and wanted == ["logps"]:
            return (g * grads["logps"][:, None]).to(g.dtype), *none[1:]  # type: ignore[index]
        with torch.autocast(inputs[0].device.type, enabled=False):
            return *_recompute(ctx, inputs, grads), *none[3:]


def _recompute(ctx: Any, inputs: list[Any], grads: dict[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, weight and bias from new tiles; sums over tokens are kept in at least float32."""
    hidden, weight, bias, targets, entropy = inputs
    kept, transform, make_tile, chunk_tokens, _ = ctx.options
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    rows = min(chunk_tokens, len(hidden))
    tile = make_tile(weight, bias, transform, rows)
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
        grad_logits = tile.rows(h, targets[at], _of(kept, at), (), coefficients.at(at)).gradient
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
