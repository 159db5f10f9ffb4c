"""FlexAttention for packed rows on a GPU, whose kernels skip the blocks of a row that nobody sees.

A model that has taken it (`adopt`) still runs everything else as with "sdpa": the attention function looks at the mask.
A BlockMask, which only `Policy` makes, goes to FlexAttention; no mask (rows of one completion, causal) and the tensor
masks of generation go to `scaled_dot_product_attention`. So nothing is switched between rollouts and updates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from ..batches.blocks import BlockLists, Blocks, block_lists
from ..batches.packing import PackedBatch, lists_to
from ..errors import UserError
from .masks import Sight, may_see, sights
from .trial import WINDOWS, dropout_of, softcap_of, why_refused

# transformers' name for its own FlexAttention, and ours for `flex_or_sdpa`.
THEIRS, OURS = "flex_attention", "logratio_flex"
# Rows are padded to a multiple of the kernels' block.
BLOCK = 128
# One graph for each of: gradients or none, one row or more, one block or more, and for sizes that happen to be equal
# where it is compiled. torch's own limit of 8 could be met, and what is beyond it runs without a kernel.
RECOMPILE_LIMIT = 64
# What transformers may ask an attention function for beyond the scale, and this one does not do.
NOT_DONE = ("dropout", "softcap", "s_aux", "position_bias")
# Where it has a backward pass that was tried.
DEVICES = ("cuda",)


def block_mask(batch: PackedBatch, window: int | None = None) -> BlockMask:
    """`masks.attention_mask` for FlexAttention, of the blocks that packing has listed."""
    lists = batch.blocks.get(window)
    if not isinstance(lists, BlockLists):  # packed for another model, with a window or an attention of its own
        made = block_lists(batch.group.cpu(), batch.segment.cpu(), BLOCK, window)
        lists = lists_to(made, batch.group.device)
    return _block_mask(sights(batch, window), lists)


def _block_mask(of: Sight, lists: BlockLists) -> BlockMask:
    # The tensors are captured one by one, and a window is in them: as a Python number it would be compiled into the
    # kernel, and layers with and without it would need kernels of their own.
    own, prompt, end = of

    def mask_mod(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return may_see(q, k, Sight(own[row, q], prompt[row, q], end[row, q]))

    lengths = (own.shape[1], own.shape[1])
    return BlockMask(lengths, **lists._asdict(), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    torch._check(query.shape[2] % BLOCK == 0)
    grouped = query.shape[1] != key.shape[1]
    options: Any = kernel_options(query)
    out = flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=options)
    assert isinstance(out, Tensor)
    return out


def kernel_options(query: Tensor) -> dict[str, Any]:
    """What torch does not find out by itself, whose kernels spill registers for it.

    No block is cut short, so nothing need be loaded within bounds (a row's length that is not known when the kernel is
    compiled does not tell). On Hopper the default for small heads, 128 x 128 on 4 warps, has no room for the mask: of
    255 registers it spills 1,200 bytes a thread, with half the keys on 8 warps it spills none (compiled for sm_90, head
    size 64, bfloat16).

    Not ROWS_GUARANTEED_SAFE, although every token sees itself: the running maximum starts at -inf, and a token whose
    first tile of keys it sees nothing of becomes NaN, and in the next layer all who share a tile of keys with it.
    """
    options: dict[str, Any] = {"IS_DIVISIBLE": True}
    if query.dtype.itemsize == 2 and query.shape[3] <= 64 and is_hopper(query.device):
        options |= {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8}
    return options


@torch.compiler.assume_constant_result
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """`_attend` as a kernel for rows of any number and length. fullgraph: it never falls back to L * L scores."""
    return torch.compile(_attend, dynamic=True, fullgraph=True)


def flex_or_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [R, heads, L, D], key and value [R, key heads, L, D] (grouped-query
    attention where these are fewer; D of 16 or more) of one dtype; returns [R, L, heads, D].

    With a BlockMask, ValueError where it is asked for what it leaves out (`NOT_DONE`).
    """
    if not isinstance(attention_mask, BlockMask):
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    asked = {"dropout": dropout or None, **options}
    left_out = [name for name in NOT_DONE if asked.get(name) is not None]
    if left_out:
        raise ValueError(f"{OURS} does not support {', '.join(left_out)}")
    if torch.is_autocast_enabled(query.device.type):  # which casts for sdpa, but not for FlexAttention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    # what they are views of differs from model to model, and each kind would be compiled anew
    query, key, value = (torch.ops.aten._unsafe_view(x, x.shape) if x._is_view() else x for x in (query, key, value))
    # around every call, because gradient checkpointing calls from a thread of its own
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        out = compiled()(query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(OURS, flex_or_sdpa)
AttentionMaskInterface.register(OURS, AttentionMaskInterface()["sdpa"])


def adopt(model: Any, asked: str | None = None) -> list[str]:
    """Let `model` use FlexAttention where that fits; returns what to tell the user.

    It is taken on a GPU in place of "sdpa", if nothing was asked for. Raises UserError where it was asked for and does
    not work. A model for which "sdpa" would not do (it has no soft-cap) keeps transformers' function of that name.
    """
    default = asked is None and model.device.type in DEVICES and model.config._attn_implementation == "sdpa"
    fits = model._supports_flex_attn and model._supports_sdpa and softcap_of(model) is None
    if not fits or not (default or asked == THEIRS):
        return []
    reason = why_not(model)
    if reason and asked:
        raise UserError(f"--attn_implementation {asked}: {reason}; leave it out")
    if reason:
        return [f"rows are masked densely, not with FlexAttention: {reason}"]
    model.set_attn_implementation(OURS)
    return []


def why_not(model: Any) -> str:
    """Why FlexAttention does not work for this model on its device, or "": what it cannot do, then a trial."""
    if model.device.type not in DEVICES:
        return f"it does not train on a {model.device.type}"
    dropout = dropout_of(model)
    if dropout:
        return f"it has no dropout, and the model's {dropout}"
    return why_refused(model, flex_or_sdpa, block_mask, Blocks(BLOCK, WINDOWS))
