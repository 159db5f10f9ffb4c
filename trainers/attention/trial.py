"""A trial of attention kernels on a model's device: packed rows by them, against the same under a dense mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..batches.packing import PackedBatch, pack
from ..data.examples import Completion, Example
from ..errors import first_line
from .masks import attention_mask

# (prompt, completions) in tokens, which end in padding; of the kernels' blocks some hold parts of two groups
GROUPS = ((150, 90, 200, 75), (40, 333), (260, 61, 128), (5, 1, 1, 80), (100, 30))
TOKENS, WINDOWS = 13 * 128, (None, 100)
# of one token; bfloat16's rounding is some 1e-2
TOLERANCE = 5e-2
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def softcap_of(model: Any) -> float | None:
    """c of the scores c tanh(s / c), where the model caps them."""
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None)


def dropout_of(model: Any) -> str:
    """The model's option that drops attention weights, and what it is; "" where none does."""
    config = model.config.get_text_config()
    return next((f"{name} is {getattr(config, name)}" for name in DROPOUTS if getattr(config, name, None)), "")


def heads_of(model: Any) -> tuple[int, int, int]:
    """Heads of queries, heads of keys, and their size."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, size


def why_refused(model: Any, attend: Callable[..., Any], mask: Callable[..., Any]) -> str:
    """Why kernels do not do for this model on its device, or "". attend: as transformers calls it, with what `mask`
    makes of a batch and a window."""
    try:
        with torch.enable_grad():
            return differs(model, attend, mask)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, too old a GPU, a fault of torch's or Triton's
        return f"it raises {type(error).__name__}: {first_line(error)}"


def differs(model: Any, attend: Callable[..., Any], mask: Callable[..., Any]) -> str:
    """How the kernels differ from attention under a dense mask, of a row of several groups and padding; or ""."""
    # As in training: one row, heads as the projections lay them out, queries and keys new out of the rope.
    heads, key_heads, size = heads_of(model)
    examples = [Example([0] * p, [Completion([0] * n) for n in lengths]) for p, *lengths in GROUPS]
    (batch,) = pack(examples, TOKENS, sequences=True)
    batch, draw = batch.to(model.device), torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(*batch.group.shape, n, size, generator=draw).to(model.device, model.dtype).requires_grad_()
        for n in (heads, key_heads, key_heads)
    )
    slope = torch.randn(*batch.group.shape, heads, size, generator=draw).to(model.device)

    def results(by: Callable[..., Tensor], seen: Any) -> dict[str, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = by(q * 1, k * 1, v, seen, size**-0.5).float()
        grads = torch.autograd.grad((out * slope).sum(), (query, key, value))
        names = ("queries' gradients", "keys' gradients", "values' gradients")
        return {"values": out.detach()} | dict(zip(names, grads, strict=True))

    def by_kernels(q: Tensor, k: Tensor, v: Tensor, seen: Any, scale: float) -> Tensor:
        return attend(model, q, k, v, seen, scaling=scale)[0]

    for window in WINDOWS:
        ours, dense = results(by_kernels, mask(batch, window)), results(_dense, attention_mask(batch, window))
        for name, truth in dense.items():
            change = largest_change(ours[name].float(), truth.float(), batch)
            if not change <= TOLERANCE:  # nor NaN
                return f"its {name} differ by {change:.0e} from those under a dense mask, of one token, relative"
    return ""


def largest_change(ours: Tensor, truth: Tensor, batch: PackedBatch) -> float:
    """Of [R, L, heads, D]: of one token, beside its own norm and the mean of all, since a small one is a small sum; of
    padding, whether it is finite."""
    norms = truth.norm(dim=(2, 3))
    change = (ours - truth).norm(dim=(2, 3)) / (norms + norms.mean())
    return float(torch.where((batch.group < 0) & change.isfinite(), 0, change).max())


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)
