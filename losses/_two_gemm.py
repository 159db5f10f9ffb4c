"""Per-token log-probabilities in two matrix products, whatever the loss that follows.

d log p_t / d h_t = (e_y - p_t) W does not depend on the loss, and the backward pass of any loss of
log-probabilities only scales it, row by row, by c_t = dL / d log p_t. So the forward pass makes a tile of logits
(first product), overwrites it with e_y - p, multiplies it by W (second product) and keeps the result [N, H];
the backward pass is one elementwise product.

Where the head itself is trained, dW = sum_t c_t (e_y - p_t) h_t^T needs c_t before the rows are summed: there the
forward pass is one product and the backward pass makes the tiles again. The same holds for a gradient
through the entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class _Rows:
    """The statistics of one chunk's logits. `scaled` [n, V] holds exp(z - max), whose sums are `scale` [n]."""

    def __init__(self, h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, transform: Any, entropy: bool):
        raw = linear(h, weight, bias)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        self.slope = _slope(raw, transform)
        z = transform(raw)  # `raw` itself where the transform is the identity; overwritten from here on
        z -= z.amax(-1, keepdim=True)
        self.y = y[:, None]
        z_y = z.gather(-1, self.y)[:, 0]
        shifted = z.clone() if entropy else None
        self.scaled = z.exp_()
        self.scale = self.scaled.sum(-1)
        self.log_scale = self.scale.log()
        self.logps = z_y - self.log_scale
        self.entropy = z_y.new_zeros(0)
        if shifted is not None:
            # p log p with p = 0 where exp underflowed: 0 * finite, since z - max is finite
            self.log_p = shifted.sub_(self.log_scale[:, None])
            self.entropy = -torch.linalg.vecdot(self.scaled, self.log_p) / self.scale

    def logp_tile(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(tile, scale) with tile * scale[:, None] = d log p_y / d raw; overwrites `scaled`.

        e_y - p is formed in the tile in at least float32: `W[y] - p @ W` cancels where p_y is near 1. The division by
        the row's sum is left to the caller, who can do it on [n, H] instead of [n, V].
        """
        tile = self.scaled.neg_()
        tile.scatter_add_(1, self.y, self.scale[:, None])
        scale = 1 / self.scale
        if dtype == torch.float16:  # the row's sum can exceed float16's range
            tile *= scale[:, None]
            scale = torch.ones_like(scale)
        if isinstance(self.slope, Tensor):
            tile *= self.slope
            return tile.to(dtype), scale
        return tile.to(dtype), self.slope * scale

    def entropy_tile(self, grad: Tensor) -> Tensor:
        """[n, V], grad_t dH_t / d raw = -grad_t p (log p + H)."""
        p = self.scaled / self.scale[:, None]
        tile = -grad[:, None] * p * (self.log_p + self.entropy[:, None])
        return tile * self.slope


def _slope(raw: Tensor, transform: Any) -> Tensor | float:
    """dz / d raw, a number unless there is a soft cap."""
    factor = transform.logit_scale / transform.temperature
    if transform.softcap is None:
        return factor
    return (1 - torch.tanh(raw * (transform.logit_scale / transform.softcap)) ** 2) * factor


class TwoGemm(torch.autograd.Function):
    """(hidden, weight, bias, targets, transform, chunk_tokens, entropy) -> (logps [N], entropy [N] or empty)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: Callable[[Tensor], Tensor],
        chunk_tokens: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        recomputes = needs_weight or needs_bias
        out_dtype = torch.promote_types(hidden.dtype, torch.float32)
        logps = hidden.new_empty(len(hidden), dtype=out_dtype)
        entropies = hidden.new_empty(len(hidden) if entropy else 0, dtype=out_dtype)
        g = torch.empty_like(hidden) if needs_hidden and not recomputes else None
        for start in range(0, len(hidden), chunk_tokens):
            at = slice(start, start + chunk_tokens)
            rows = _Rows(hidden[at], weight, bias, targets[at], transform, entropy)
            logps[at] = rows.logps
            if entropy:
                entropies[at] = rows.entropy
            if g is not None:
                tile, scale = rows.logp_tile(weight.dtype)
                g[at] = (tile @ weight).mul_(scale[:, None])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, *((hidden, weight, bias, targets) if recomputes or entropy else ()))
        ctx.options = transform, chunk_tokens
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        g, *inputs = ctx.saved_tensors
        if g is not None and (grad_entropy is None or not grad_entropy.numel()):
            hidden_grad = None if grad_logps is None else (g * grad_logps[:, None]).to(g.dtype)
            return hidden_grad, None, None, None, None, None, None
        return *_recompute(ctx, inputs, grad_logps, grad_entropy), None, None, None, None


def _recompute(
    ctx: Any, inputs: list[Any], grad_logps: Tensor | None, grad_entropy: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of hidden, weight and bias from new tiles; sums over tokens are kept in at least float32."""
    hidden, weight, bias, targets = inputs
    transform, chunk_tokens = ctx.options
    sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
    grad_bias = torch.zeros_like(weight[:, 0], dtype=sum_dtype) if needs_bias else None
    for start in range(0, len(hidden), chunk_tokens):
        at = slice(start, start + chunk_tokens)
        h = hidden[at]
        rows = _Rows(h, weight, bias, targets[at], transform, grad_entropy is not None)
        tile: Any = 0.0 if grad_entropy is None else rows.entropy_tile(grad_entropy[at])
        if grad_logps is not None:
            logp_tile, scale = rows.logp_tile(sum_dtype)
            tile = tile + logp_tile.mul_((scale * grad_logps[at])[:, None])
        low = tile.to(weight.dtype)
        if grad_hidden is not None:
            grad_hidden[at] = low @ weight
        if grad_weight is not None:
            grad_weight += low.t() @ h
        if grad_bias is not None:
            grad_bias += tile.sum(0)
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(weight.dtype),
    )
