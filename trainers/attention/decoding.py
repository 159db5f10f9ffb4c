"""Attention of one new token a row: the query heads of a group stand as queries of the one key head that they share.

    softmax(q k^T s + bias) v      with q [R, key heads, G, D], k and v [R, key heads, L, D], bias [R, 1, 1, L]

transformers' "sdpa" repeats keys and values G times wherever there is a mask (up to some release), and torch makes a
bias out of a boolean one in every layer. Here nothing is repeated, and the bias is made once for all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

DECODING = "logratio_decoding"
# What transformers may ask an attention function for, and `attend_last` does not do: "sdpa" says what it makes of it.
NOT_DONE = ("softcap", "s_aux", "position_bias")
# The kernels that take a bias, and need no plan made for every shape.
BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend_last(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [R, heads, 1, D], key and value [R, key heads, L, D]; returns
    [R, 1, heads, D]. Another number of queries, or no mask, is left to "sdpa"."""
    asked = dropout or any(options.get(name) is not None for name in NOT_DONE)
    if query.shape[2] != 1 or attention_mask is None or asked:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    rows, heads, _, size = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    bias = attention_mask.to(query.dtype).expand(*grouped.shape[:3], key.shape[2])
    if query.is_cuda:
        with sdpa_kernel(BACKENDS):
            out = scaled_dot_product_attention(grouped, key, value, bias, scale=scaling)
    else:
        out = scaled_dot_product_attention(grouped, key, value, bias, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[3]), None


AttentionInterface.register(DECODING, attend_last)
AttentionMaskInterface.register(DECODING, AttentionMaskInterface()["sdpa"])


def bias_of(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, of the mask in boolean form; every row sees something."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Inside, a transformers model attends so, with `bias_of` as its mask; one with "eager" attention goes on with
    its own."""
    config = model.config.get_text_config()
    own = config._attn_implementation
    if own == "eager":
        yield
        return
    config._attn_implementation = DECODING
    try:
        yield
    finally:
        config._attn_implementation = own
