"""Frozen linear layers with LoRA adapters, computed in one step: y = x W^T + b + s (x A^T) B^T.

PEFT's forward does the low-rank part beside the base product, which costs passes over [N, out] for the product, its
scaling, the sum, and casts to the adapters' float32 and back. Here it is added into y by the matrix product itself,
with s as the product's factor, and backward does the same with dx:

    u = s x A^T             y = x W^T + b,  y += u B^T
    du = s dy B             dx = dy W,      dx += du A          dA = du^T x          dB = dy^T u

Layers that are given the same x are computed together: one product for all u, one for all dA, and one dx into which all
add. `lora_layers.py` says which layers of a model compute so.

What differs from PEFT's forward:
1. Adapters are computed in x's dtype (under autocast in its dtype); PEFT computes float32 adapters of half-precision
   models in float32 where there is no autocast. Their gradients are float32 in any case, from products that accumulate
   in float32; outside of CUDA they are rounded once to x's dtype.
2. Kept for backward are x, once for all who share it, and u: no copy of x or of a weight in another dtype than x's own;
   and no x where it is made again (`made_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .casts import stacked
from .nf4 import is_repacked, refuse_repacked
from .packed_weights import has_packed
from .swiglu import product


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
        mine = self.base is other.base and self.a is other.a and self.b is other.b
        return mine and self[3:] == other[3:]


def lora_linear(x: Tensor, parts: Sequence[Part], made_of: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
    """[..., out_i] of every part, from x [..., in], in one node of the graph.

    made_of: the gate and up whose SwiGLU x is; they are kept anyway, and x is made again from them.
    """
    return _LoraLinear.apply(x, tuple(parts), made_of, *(part.a for part in parts), *(part.b for part in parts))


class _LoraLinear(torch.autograd.Function):
    """forward(x, parts, made_of, A_1 .. A_n, B_1 .. B_n) -> (y_1, .., y_n).

    Products are written with `out=` or in place, which autocast leaves alone: it would cast what `Part` has decided.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: tuple[Part, ...], made_of: tuple[Tensor, Tensor] | None, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        count, dtype = len(parts), parts[0].dtype
        cast = _to(x.contiguous(), dtype)
        rows = cast.view(-1, x.shape[-1])
        u = _scaled(rows, factors[:count], parts)
        needs_weights, weights, outputs = ctx.needs_input_grad[0], [], []
        for part, b, own in zip(parts, factors[count:], _columns(u, factors[:count]), strict=True):
            if type(part.base) is nn.Linear:
                y = _dense(part.base, cast, rows)
                if needs_weights:  # for dx alone, no copy of it; a quantized one is found through its layer
                    weights.append(part.base.weight)
            else:
                y = _quantized(part, x)
            y.view(-1, y.shape[-1]).addmm_(own, stacked((b,), dtype).t())
            outputs.append(_to(y, part.out))
        kept = made_of if made_of is not None and cast is x else (cast, None)
        ctx.parts, ctx.remakes = parts, kept is made_of
        ctx.save_for_backward(*kept, u, *factors, *weights)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        parts, count = ctx.parts, len(ctx.parts)
        x, up, u, *rest = ctx.saved_tensors
        factors, weights = rest[: 2 * count], rest[2 * count :]
        needs_x, _, _, *needs = ctx.needs_input_grad
        needs_a = any(needs[:count])
        if ctx.remakes and needs_a:
            x = product(x, up)
        dtype, rows = x.dtype, x.view(-1, x.shape[-1])
        us = _columns(u, factors[:count])
        used = [i for i, dy in enumerate(grads) if dy is not None]  # an output may be no part of the loss
        out: list[Tensor | None] = [None] * (3 + 2 * count)
        if not used:
            return tuple(out)
        dys = {i: _to(dy.reshape(-1, dy.shape[-1]), dtype) for i, dy in enumerate(grads) if dy is not None}
        for i in used:
            if needs[count + i]:
                out[3 + count + i] = _gradient(dys[i].t(), us[i])
        if not needs_x and not needs_a:
            return tuple(out)
        mine = [factors[i] for i in used]
        du = rows.new_empty(rows.shape[0], sum(a.shape[0] for a in mine))
        for i, own in zip(used, _columns(du, mine), strict=True):
            own.addmm_(dys[i], stacked((factors[count + i],), dtype), beta=0, alpha=parts[i].scaling)
        if needs_a:
            da = _gradient(du.t(), rows)
            for i, own in zip(used, _columns(da, mine, 0), strict=True):
                out[3 + i] = own
        if needs_x:
            dx = rows.new_empty(rows.shape, dtype=parts[0].compute)
            for k, i in enumerate(used):
                weight = weights[i] if weights else _dequantized(parts[i])
                dx.addmm_(_to(dys[i], dx.dtype), _to(weight, dx.dtype), beta=1 if k else 0)
            out[0] = _to(dx, dtype).addmm_(du, stacked(mine, dtype)).view(x.shape)
        return tuple(out)  # autograd casts each to the dtype of what it is the gradient of


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without the call where there is nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


def _columns(u: Tensor, a: Sequence[Tensor], dim: int = 1) -> Sequence[Tensor]:
    """The part of u, or with dim 0 of what stands in rows, that belongs to each A."""
    return (u,) if len(a) == 1 else u.split_with_sizes([one.shape[0] for one in a], dim)


def _scaled(rows: Tensor, factors: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """[N, sum of r_i]: s_i x A_i^T side by side, rounded once."""
    u = rows.new_empty(rows.shape[0], sum(a.shape[0] for a in factors))
    if len({part.scaling for part in parts}) == 1:
        return u.addmm_(rows, stacked(factors, rows.dtype).t(), beta=0, alpha=parts[0].scaling)
    for part, a, own in zip(parts, factors, _columns(u, factors), strict=True):
        own.addmm_(rows, stacked((a,), rows.dtype).t(), beta=0, alpha=part.scaling)
    return u


def _gradient(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of two matrices of one dtype; on CUDA of 16 bits in the float32 that it accumulates in."""
    if left.is_cuda and left.dtype.itemsize == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right, out=left.new_empty(left.shape[0], right.shape[1]))


def _dense(base: nn.Linear, x: Tensor, rows: Tensor) -> Tensor:
    """x W^T + b in x's dtype, which autocast may have chosen. rows: x as a matrix. [..., out]"""
    if has_packed(base):
        return base(x)  # type: ignore[no-any-return]
    weight, bias = _to(base.weight, x.dtype), base.bias
    width = weight.shape[0]
    y = x.new_empty(*x.shape[:-1], width)
    # written into, because a product's view as one of several outputs could not be changed in place behind this
    into = y.view(-1, width)
    if bias is None:
        torch.mm(rows, weight.t(), out=into)
    else:
        torch.addmm(_to(bias, x.dtype), rows, weight.t(), out=into)
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
    dtype, device, weight = x.dtype, x.device.type, base.weight
    casts = torch.is_autocast_enabled(device) and torch.float64 not in (dtype, weight.dtype)  # which it leaves alone
    auto = torch.get_autocast_dtype(device) if casts else dtype
    if type(base) is nn.Linear:
        return (auto, auto, auto) if casts or dtype is weight.dtype else None
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
