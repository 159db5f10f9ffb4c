"""Rotary position embedding (RoPE, Su et al. 2021, eq. 34) of queries and keys, on a GPU by one kernel each way.

    y = x cos + (-x2, x1) sin      with x1, x2 the halves of a head's x

transformers computes it in five passes over each of both, and rounds in each; here the result is rounded once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .swiglu import triton_kernels

# The function of a model's own module that its attention calls.
NAME = "apply_rotary_pos_emb"


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """query [R, heads, L, D] and key [R, key heads, L, D] rotated; cos and sin [R or 1, L, D], of the same dtype."""
    return _Rotate.apply(query, key, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(query, key, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True: what follows would silently count as a constant
            raise RuntimeError("no second derivative of fused layers; load the model with fused_layers=False")
        return (*_rotated(d_query, d_key, *ctx.saved_tensors, back=True), None, None)


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    kernels = triton_kernels() if query.is_cuda else None
    if kernels is not None:
        return kernels.rotate(query, key, cos, sin, back)
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]

    def one(x: Tensor) -> Tensor:
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
        if back:  # the transpose
            turned = x * sin
            turned = torch.cat((turned[..., half:], -turned[..., :half]), dim=-1)
        return x * cos + turned

    return one(query), one(key)


def fits(query: Any, key: Any, cos: Any, sin: Any) -> bool:
    """Whether `rotate` is written for them: whole heads of an even power of 2, one dtype, one device."""
    if not all(isinstance(x, Tensor) for x in (query, key, cos, sin)) or cos.dim() != 3 or query.dim() != 4:
        return False
    size, length = query.shape[-1], query.shape[2]
    alike = query.dtype == key.dtype == cos.dtype == sin.dtype and cos.device == query.device
    shapes = cos.shape == sin.shape and cos.shape[1:] == (length, size) and cos.shape[0] in (1, query.shape[0])
    return alike and shapes and size == key.shape[-1] and size >= 2 and size & (size - 1) == 0


def rotating(own: Callable[..., Any]) -> Callable[..., Any]:
    """A model's own function, which `rotate` takes the place of where it is written for the arguments."""

    def rotary(query: Any, key: Any, cos: Any, sin: Any, *more: Any, **named: Any) -> Any:
        if more or named or not fits(query, key, cos, sin):
            return own(query, key, cos, sin, *more, **named)
        return rotate(query, key, cos, sin)

    return rotary


def own_function(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """What a forward of an attention module calls by that name, or None."""
    raw = inspect.unwrap(forward)
    if not isinstance(raw, FunctionType) or NAME not in raw.__code__.co_names:
        return None
    return raw.__globals__.get(NAME)


def with_rotation(forward: Callable[..., Any], function: Callable[..., Any]) -> FunctionType:
    """The same forward with `function` by that name, where the module's other classes go on with their own."""
    raw: Any = inspect.unwrap(forward)
    names = {**raw.__globals__, NAME: function}
    copy = FunctionType(raw.__code__, names, raw.__name__, raw.__defaults__, raw.__closure__)
    copy.__kwdefaults__ = raw.__kwdefaults__
    return copy
