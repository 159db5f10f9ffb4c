"""Attention of packed rows on a CPU, a stretch of a row at a time with the keys that it may see at all.

Under a dense mask `scaled_dot_product_attention` computes every pair of a row, seen or not. Here a prompt meets itself,
and a completion its prompt and itself, under their part of the same mask: of a prompt of 100 tokens and eight
completions of 130 each a fifth of the pairs. (On a GPU `varlen.py` does so with one kernel.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from ..batches.packing import PackedBatch
from .masks import attention_mask

STRETCHES = "logratio_stretches"
# What a stretch costs beyond its pairs of tokens, in pairs: the splitting, the call, and the joining of the results.
CALL_PAIRS = 10_000
# What transformers may ask an attention function for, and `attend` does not do: the dense mask is taken as it is.
NOT_DONE = ("softcap", "s_aux", "position_bias", "cache", "indices", "block_indices")


class Stretch(NamedTuple):
    """A prompt, a completion, or the padding at the end of a row.

    length: in tokens. prompt: which stretch is the prompt in front of it, of a completion.
    sees: [length, keys] bool, what it sees of that prompt and then of itself.
    """

    length: int
    prompt: int | None
    sees: Tensor

    @property
    def pairs(self) -> int:
        return self.sees.numel()


def stretch_mask(batch: PackedBatch, window: int | None = None, always: bool = False) -> Tensor:
    """`masks.attention_mask`, with its stretches as an attribute if they are worth it, or `always`; models hand it on
    as it is."""
    mask = attention_mask(batch, window)
    found = stretches(batch, mask.detach())  # of views of the mask itself it would never be rid
    if always or sum(s.pairs + CALL_PAIRS for s in found) < mask.numel():
        mask.stretches = found  # type: ignore[attr-defined]
    return mask


def stretches(batch: PackedBatch, mask: Tensor) -> list[Stretch]:
    """Those of all rows, one after the other. mask: [R, 1, L, L] bool."""
    found: list[Stretch] = []
    for group, segment, sees in zip(batch.group, batch.segment, mask[:, 0], strict=True):
        (_, parts), lengths = torch.unique_consecutive(torch.stack([group, segment]), dim=1, return_counts=True)
        start, prompt, prompt_at = 0, 0, slice(0)
        for part, length in zip(parts.tolist(), lengths.tolist(), strict=True):
            own = slice(start, start + length)
            if part == 0:  # a prompt, or padding
                prompt, prompt_at = len(found), own
                found.append(Stretch(length, None, sees[own, own]))
            else:
                found.append(Stretch(length, prompt, torch.cat([sees[own, prompt_at], sees[own, own]], dim=1)))
            start = own.stop
    return found


def stretches_or_sdpa(
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
    attention where these are fewer); returns [R, L, heads, D]. Without stretches, what "sdpa" computes."""
    found: list[Stretch] | None = getattr(attention_mask, "stretches", None)
    if found is None or any(options.get(name) is not None for name in NOT_DONE):
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    return attend(query, key, value, found, dropout, scaling), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, found: list[Stretch], dropout: float, scale: float | None
) -> Tensor:
    """[R, L, heads, D], each stretch with its own keys."""
    lengths = [s.length for s in found]
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = []
    for i, (_, prompt, sees) in enumerate(found):
        seen = [i] if prompt is None else [prompt, i]
        q, k, v = _joined(queries, [i]), _joined(keys, seen), _joined(values, seen)
        attended = scaled_dot_product_attention(q, k, v, sees, dropout, scale=scale, enable_gqa=grouped)
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out).unflatten(0, (query.shape[0], -1))


def _joined(parts: Sequence[Tensor], which: list[int]) -> Tensor:
    """[1, heads, tokens, D], of parts [tokens, heads, D]."""
    chosen = [parts[i] for i in which]
    return (torch.cat(chosen) if len(chosen) > 1 else chosen[0]).transpose(0, 1)[None]


AttentionInterface.register(STRETCHES, stretches_or_sdpa)
AttentionMaskInterface.register(STRETCHES, AttentionMaskInterface()["sdpa"])


def adopt_stretches(model: Any) -> bool:
    """Let `model` attend so in place of "sdpa", on a CPU; returns whether it does."""
    fits = model.device.type == "cpu" and model.config._attn_implementation == "sdpa"
    if fits and model._can_set_attn_implementation():
        model.set_attn_implementation(STRETCHES)
    return model.config._attn_implementation == STRETCHES
