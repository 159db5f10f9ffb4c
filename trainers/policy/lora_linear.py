"""Frozen linear layers with LoRA adapters, computed in one step: y = x W^T + b + s (x A^T) B^T.

PEFT's forward does the low-rank part beside the base product, which costs passes over [N, out] for the product, its
scaling, the sum, and casts to the adapters' float32 and back. Here it is added into y by the matrix product itself,
with s as the product's factor, and backward does the same with dx:

    u = x A^T               y = x W^T + b,  y += s u B^T
    du = s dy B             dx = dy W,      dx += du A          dA = du^T x          dB = s dy^T u

Layers that are given the same x are computed together: one product for all u, one for all dA, and one dx into which all
add. `lora_layers.py` says which layers of a model compute so.

What differs from PEFT's forward:
1. Adapters are computed in x's dtype (under autocast in its dtype); PEFT computes float32 adapters of half-precision
   models in float32 where there is no autocast. Their gradients are float32 in any case, from products that accumulate
   in float32 and are rounded once to x's dtype.
2. Kept for backward are x, once for all who share it, and u: no copy of x or of a weight in another dtype than x's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .nf4 import is_repacked, refuse_repacked


class Part(NamedTuple):
    """A linear layer with the one adapter that acts in this call. `base` is the layer that PEFT wraps."""

    base: nn.Linear
    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scaling: float
    compute: torch.dtype  # of the base product
    dtype: torch.dtype  # of the adapter's products, and of y while they are added
    out: torch.dtype  # of y as it is returned

    def fits(self, other: Part) -> bool:
        """Whether both can be computed together."""
        alike = self.a.shape[1] == other.a.shape[1] and type(self.base) is type(other.base)
        return alike and self[4:] == other[4:]

    def same(self, other: Part) -> bool:
        """Whether it is the same adapter of the same layer, computed alike."""
        return all(mine is theirs for mine, theirs in zip(self[:3], other[:3], strict=True)) and self[3:] == other[3:]


def lora_linear(x: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """[..., out_i] of every part, from x [..., in], in one node of the graph."""
    return _LoraLinear.apply(x, tuple(parts), *(part.a for part in parts), *(part.b for part in parts))


class _LoraLinear(torch.autograd.Function):
    """forward(x, parts, A_1 .. A_n, B_1 .. B_n) -> (y_1, .., y_n).

    Products are written with `out=` or in place, which autocast leaves alone: it would cast what `Part` has decided.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: tuple[Part, ...], *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        dtype = parts[0].dtype
        cast = x.contiguous().to(dtype)
        rows = cast.view(-1, x.shape[-1])
        a = _stacked(factors[: len(parts)], dtype)
        u = torch.mm(rows, a.t(), out=rows.new_empty(len(rows), len(a)))
        outputs = []
        for part, own in zip(parts, u.split([len(part.a) for part in parts], dim=1), strict=True):
            y = _dense(part, cast) if type(part.base) is nn.Linear else _quantized(part, x)
            y.view(-1, y.shape[-1]).addmm_(own, part.b.to(dtype).t(), alpha=part.scaling)
            outputs.append(y.to(part.out))
        ctx.parts = parts
        # a weight is kept (no copy of it) for dx alone; a quantized one is found through its layer
        weights = [part.base.weight for part in parts if ctx.needs_input_grad[0] and type(part.base) is nn.Linear]
        ctx.save_for_backward(cast, u, *factors, *weights)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        parts, count = ctx.parts, len(ctx.parts)
        x, u, *rest = ctx.saved_tensors
        factors, weights = rest[: 2 * count], rest[2 * count :]
        needs_x, needs_a, needs_b = ctx.needs_input_grad[0], *_halves(ctx.needs_input_grad[2:])
        rows = x.view(-1, x.shape[-1])
        us = u.split([len(part.a) for part in parts], dim=1)
        used = [i for i, dy in enumerate(grads) if dy is not None]  # an output may be no part of the loss
        out: list[Tensor | None] = [None] * (2 + 2 * count)
        if not used:
            return tuple(out)
        dys = {i: dy.reshape(-1, dy.shape[-1]).to(x.dtype) for i, dy in enumerate(grads) if dy is not None}
        for i in used:
            if needs_b[i]:
                out[2 + count + i] = _product(dys[i].t(), us[i], parts[i].scaling)
        if not needs_x and not any(needs_a):
            return tuple(out)
        ranks = [us[i].shape[1] for i in used]
        du = rows.new_empty(len(rows), sum(ranks))
        for i, own in zip(used, du.split(ranks, dim=1), strict=True):
            own.addmm_(dys[i], factors[count + i].to(x.dtype), beta=0, alpha=parts[i].scaling)
        if any(needs_a):
            for i, own in zip(used, _product(du.t(), rows).split(ranks), strict=True):
                out[2 + i] = own
        if needs_x:
            dx = rows.new_empty(rows.shape, dtype=parts[0].compute)
            for k, i in enumerate(used):
                weight = weights[i] if weights else _dequantized(parts[i])
                dx.addmm_(dys[i].to(dx.dtype), weight.to(dx.dtype), beta=1 if k else 0)
            dx = dx.to(x.dtype).addmm_(du, _stacked([factors[i] for i in used], x.dtype))
            out[0] = dx.view(x.shape)
        return tuple(out)  # autograd casts each to the dtype of what it is the gradient of


def _stacked(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[sum of r_i, in]."""
    return torch.cat([w.to(dtype) for w in weights]) if len(weights) > 1 else weights[0].to(dtype)


def _halves(values: Sequence[bool]) -> tuple[Sequence[bool], Sequence[bool]]:
    return values[: len(values) // 2], values[len(values) // 2 :]


def _product(left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """factor * left @ right, of two matrices of one dtype."""
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=factor)


def _dense(part: Part, x: Tensor) -> Tensor:
    """x W^T + b in x's dtype, which autocast may have chosen. [..., out]"""
    weight, bias = part.base.weight.to(x.dtype), part.base.bias
    y = x.new_empty(*x.shape[:-1], len(weight))
    # written into, because a product's view as one of several outputs could not be changed in place behind this
    rows, into = x.view(-1, x.shape[-1]), y.view(-1, len(weight))
    if bias is None:
        torch.mm(rows, weight.t(), out=into)
    else:
        torch.addmm(bias.to(x.dtype), rows, weight.t(), out=into)
    return y


def _quantized(part: Part, x: Tensor) -> Tensor:
    """x W^T + b as bitsandbytes computes it, in its own dtype for this layer, then in the adapter's. [..., out]"""
    from bitsandbytes import matmul_4bit

    weight: Any = part.base.weight
    bias = None if part.base.bias is None else part.base.bias.to(part.compute)
    rows = x.reshape(-1, x.shape[-1]).to(part.compute)
    y = matmul_4bit(rows, weight, bias=bias, quant_state=weight.quant_state).to(part.dtype)
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])  # no view for autograd, see `_dense`


def _dequantized(part: Part) -> Tensor:
    """W, [out, in], in the dtype that was quantized."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = part.base.weight
    refuse_repacked(weight)  # since the forward pass
    return dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)


def dtypes_of(base: Any, x: Tensor) -> tuple[torch.dtype, torch.dtype, torch.dtype] | None:
    """(compute, dtype, out) of a `Part`, or None where x and the weights do not go together."""
    exact = torch.float64 in (x.dtype, base.weight.dtype)  # which autocast leaves as it is
    casts = torch.is_autocast_enabled(x.device.type) and not exact
    auto = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
    if type(base) is nn.Linear:
        return (auto, auto, auto) if casts or x.dtype == base.weight.dtype else None
    state = getattr(base.weight, "quant_state", None)
    if torch.is_grad_enabled():
        refuse_repacked(base.weight)
    if state is None or not base.compute_type_is_set or is_repacked(base.weight):
        return None  # its own forward settles the first two, and computes what a CPU has repacked for inference
    if tuple(state.shape) != (base.out_features, base.in_features) or x.dtype == torch.float64:
        return None
    compute = base.compute_dtype or x.dtype
    # bitsandbytes returns x's dtype; the adapter is added before that cast where autocast has it computed in this dtype
    return compute, compute if compute == auto else x.dtype, x.dtype
