"""FlashAttention-2 for packed rows on a GPU: torch's own kernels for sequences of any length, nothing to compile.

What a row's tokens see is causal attention of sequences, once the keys of a prompt are there for each of its
completions (`batches/sequences.py`). With few key heads copies cost little, they are gone when the layer is done, and
the backward pass makes them again and sums their gradients.

A model that has taken it (`adopt`) still runs everything else as with "sdpa": only a mask that knows its sequences,
which only `Policy` makes, goes to these kernels. The gradients of queries are summed by atomic additions in float32,
in no fixed order, unless `torch.use_deterministic_algorithms` is on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface

from ..batches.packing import PackedBatch, lists_to
from ..batches.sequences import VARLEN, KeyLists, key_lists
from .trial import dropout_of, heads_of, softcap_of, why_refused

# Where, and of what, there are kernels.
DEVICES, DTYPES = ("cuda",), (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
# What transformers may ask an attention function for beyond the scale, and this one does not do.
NOT_DONE = ("dropout", "softcap", "s_aux", "position_bias", "cache", "indices", "block_indices")
flash_forward = torch.ops.aten._flash_attention_forward.default
flash_backward = torch.ops.aten._flash_attention_backward.default


@dataclass(frozen=True)
class Seen:
    """Who sees whom in a micro-batch. window: the sliding one, None for full attention."""

    lists: KeyLists
    window: int | None

    def options(self, scale: float | None) -> dict[str, Any]:
        """Of the kernels, by keyword: they see from so many keys on the left of the query's own place."""
        return {"scale": scale, "window_size_left": (self.window or 0) - 1, "window_size_right": 0}

    @property
    def sizes(self) -> tuple[Tensor, Tensor, int, int, float, bool]:
        """Of the kernels, by place: the sequences, no dropout, causal."""
        own = self.lists
        return own.query_ends, own.key_ends, own.longest_query, own.longest_key, 0.0, True


def varlen_mask(batch: PackedBatch, window: int | None = None) -> Tensor:
    """`masks.attention_mask` for these kernels: an empty mask, which models hand on as it is, with `Seen` as an
    attribute. To what does not know it, no scores have its shape."""
    lists = batch.sequences
    if lists is None:  # packed for another attention
        lists = lists_to(key_lists(batch.group.cpu(), batch.segment.cpu()), batch.group.device)
    mask = torch.empty(1, 1, 1, 0, dtype=torch.bool, device=batch.group.device)
    mask.seen = Seen(lists, window)  # type: ignore[attr-defined]
    return mask


def varlen_or_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [R, heads, L, D], key and value [R, key heads, L, D] (grouped-query
    attention where these are fewer) in half precision; returns [R, L, heads, D].

    With a mask that knows its sequences, ValueError where it is asked for what it leaves out (`NOT_DONE`), or for a
    dtype that it does not take. Without, what "sdpa" computes.
    """
    seen: Seen | None = getattr(attention_mask, "seen", None)
    if seen is None:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    asked = {"dropout": dropout or None, **options}
    left_out = [name for name in NOT_DONE if asked.get(name) is not None]
    if left_out:
        raise ValueError(f"{VARLEN} does not support {', '.join(left_out)}")
    if torch.is_autocast_enabled(query.device.type):  # which casts for sdpa, but not for these
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.dtype not in DTYPES:
        raise ValueError(f"{VARLEN} does not support {query.dtype}")
    out: Tensor = _Attention.apply(query, key, value, seen, scaling)
    return out, None


class _Attention(torch.autograd.Function):
    """Keeps what attention keeps in any case; the copies of keys and values are made again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen: Seen, scale: float | None) -> Tensor:  # type: ignore[override]
        rows, _, length, _ = query.shape
        q = _tokens(query).contiguous()
        k, v = copied(key, seen.lists), copied(value, seen.lists)
        out, row_sums, *random = flash_forward(q, k, v, *seen.sizes, False, **seen.options(scale))
        out = out.unflatten(0, (rows, length))
        ctx.save_for_backward(q, key, value, out, row_sums)
        ctx.seen, ctx.scale, ctx.random = seen, scale, random[:2]  # which only dropout would read
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (q, key, value, out, row_sums), seen = ctx.saved_tensors, ctx.seen
        k, v = copied(key, seen.lists), copied(value, seen.lists)
        d_out, out = d_out.flatten(0, 1), out.flatten(0, 1)
        options = seen.options(ctx.scale)
        dq, dk, dv = flash_backward(d_out, q, k, v, out, row_sums, *seen.sizes, *ctx.random, **options)
        dk, dv = sum_copies(dk, dv, seen.lists)
        rows, _, length, _ = key.shape
        dq, dk, dv = (x.unflatten(0, (rows, length)).transpose(1, 2) for x in (dq, dk, dv))
        return dq, dk, dv, None, None


def copied(x: Tensor, lists: KeyLists) -> Tensor:
    """Keys or values [R, heads, L, D] in the order in which the sequences see them, [T', heads, D]."""
    tokens = _tokens(x)
    return tokens if lists.source is None else tokens.index_select(0, lists.source)


def sum_copies(dk: Tensor, dv: Tensor, lists: KeyLists) -> tuple[Tensor, Tensor]:
    """Gradients [T', heads, D] of keys and of values, summed over the copies of each of T tokens, in order, in float32
    (or what is wider); in the dtype that they come in."""
    if lists.source is None:
        return dk, dv
    if dk.is_cuda:
        from . import _triton

        return _triton.sum_copies(dk, dv, lists)
    assert lists.copies_of is not None
    index, tokens = lists.source.long(), len(lists.copies_of) - 1
    dtype = torch.promote_types(dk.dtype, torch.float32)
    dk, dv = (
        x.new_zeros((tokens, *x.shape[1:]), dtype=dtype).index_add_(0, index, x.to(dtype)).to(x.dtype) for x in (dk, dv)
    )
    return dk, dv


def _tokens(x: Tensor) -> Tensor:
    """[R, heads, L, D] as [R * L, heads, D], each head's numbers side by side: no copy of what projections lay out."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if x.stride(2) == 1 else x.contiguous()


AttentionInterface.register(VARLEN, varlen_or_sdpa)
AttentionMaskInterface.register(VARLEN, AttentionMaskInterface()["sdpa"])


def adopt(model: Any) -> str:
    """Let `model` attend so in place of "sdpa", where that fits and a trial agrees; returns what the trial found."""
    if not fits(model):
        return ""
    reason = why_refused(model, varlen_or_sdpa, varlen_mask)
    if not reason:
        model.set_attn_implementation(VARLEN)
    return reason


def fits(model: Any) -> bool:
    """Whether there are kernels for it: for its device, dtype (or autocast's) and size of heads, and its attention can
    be set and asks for no more."""
    device = model.device.type
    settable = model._supports_sdpa and model._can_set_attn_implementation()
    if device not in DEVICES or model.config._attn_implementation != "sdpa" or not settable:
        return False
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    try:
        size = heads_of(model)[2]
    except Exception:  # transformers' for heads of several sizes (Gemma 4)
        return False
    plain = softcap_of(model) is None and not dropout_of(model)
    return plain and dtype in DTYPES and size % 8 == 0 and size <= LARGEST_HEAD
