"""Bytes that autograd keeps of a forward pass, by layer, and what the backward pass needs beside them.

Worked out from the modules' forward (transformers 5.23, PEFT 0.19) and held to what `saved_tensors_hooks` counts of
small models, where it is exact on a CPU with "sdpa". Per token, with e bytes an element of the weights' dtype (4:
float32):

- RMSNorm keeps its input in float32 (in half precision that is a copy), and one float a token; under a weight that
  trains, what that is multiplied with too.
- A linear layer keeps its input where it trains; frozen it keeps none. LoRA's A and B keep x and u = A x: PEFT in half
  precision a float32 copy of x for every layer, `fused_lora` x itself, once for the layers that share it.
- Attention keeps queries, keys, values, output and a float a head; cos and sin are common to all layers. A dense mask
  comes as a float of the dtype, a new one in each layer, and has keys and values repeated for every query head.
- SwiGLU keeps gate, silu(gate) and up; the product is the down projection's input.
- Residual additions and the embedding keep nothing.

RMSNorm of `fused_layers` and of Liger-Kernel keeps x as it is, their SwiGLU no silu(gate); ours under LoRA no product
either, which is made again for the backward pass. Liger's, attention in long rows, and what CUDA's kernels for a dense
mask add (rows of the mask padded to 16) follow their sources.

Attention by sequences has keys and values of prompts once more for every completion but the first, their gradients, and
those of queries in float32, of one layer at a time. They are not counted: as a rule they are less than SwiGLU needs at
its moment, which is over by then (many short completions of a long prompt may need more).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .geometry import Geometry

if TYPE_CHECKING:
    from .peak import Setup


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch: R rows of L tokens, padding included, of which N are scored, on so many paths.

    plain: one completion a row behind its prompt, so that no mask is needed (`PackedBatch.plain`).
    """

    rows: int
    row_length: int
    scored_tokens: int
    num_paths: int = 1
    plain: bool = False

    @classmethod
    def of(cls, packed: Any) -> Batch:
        """Of a `trainers.packing.PackedBatch`."""
        rows, length = packed.input_ids.shape
        return cls(rows, length, len(packed.hidden_index), len(packed.scored), packed.plain)

    @property
    def tokens(self) -> int:
        return self.rows * self.row_length


@dataclass(frozen=True)
class Activations:
    """Bytes. saved: all that is alive when the backbone's forward has ended. backward: the most that its backward adds
    to that; layer: of one layer, which gradient checkpointing makes again and counts in `backward`; each: of `saved`,
    what a layer has in it."""

    saved: int
    backward: int
    layer: int
    each: int


def activations(size: Geometry, how: Setup, batch: Batch) -> Activations:
    """Of one micro-batch through the backbone, the LM head aside."""
    tokens, e = batch.tokens, how.element
    layer = _attention(size, how, batch) + _projections(size, how) * tokens + 2 * _norm(size, how) * tokens
    if size.qk_norm:
        layer += _norm_of(size.heads + size.kv_heads, size.head_dim, size, how) * tokens
    last_norm = _norm(size, how) * tokens
    common = 2 * tokens * size.head_dim * e  # cos and sin
    common += 8 * tokens * (not how.lora_r)  # the embedding's indices
    # the residual stream in front of a layer is what its norm keeps, where there is no float32 copy of it
    stream = size.hidden * e * tokens
    kept_by_norm = e == 4 or how.use_liger_kernel or how.fuses
    if how.gradient_checkpointing:
        # a layer is made again in front of its backward, from its input, and its mask from the one of all layers
        mask = 0 if batch.plain or how.long_rows else batch.rows * batch.row_length**2
        saved = common + size.layers * stream + last_norm + mask
        again = layer - (stream if kept_by_norm else 0)
        return Activations(saved, _in_backward(size, how, tokens, last_norm, again), layer, stream)
    saved = common + size.layers * layer + last_norm
    if how.lora_r:  # nothing trains in front of the first norm
        saved -= _norm(size, how) * tokens
    return Activations(saved, _in_backward(size, how, tokens, last_norm, 0), layer, layer)


def _norm(size: Geometry, how: Setup) -> int:
    return _norm_of(1, size.hidden, size, how)


def _norm_of(count: int, width: int, size: Geometry, how: Setup) -> int:
    """Bytes a token of `count` norms over `width`."""
    if how.use_liger_kernel or how.fuses:
        return count * (width * how.element + 4)
    factor = 0 if how.lora_r else (4 if size.wide_norm else how.element)
    return count * (width * (4 + factor) + 4)


def _attention(size: Geometry, how: Setup, batch: Batch) -> int:
    """Queries, keys, values, output and row sums of one layer, and its mask."""
    e = how.element
    masked = not batch.plain and not how.long_rows
    keys = size.queries if masked else size.keys
    total = batch.tokens * ((2 * size.queries + 2 * keys) * e + 4 * size.heads)
    if masked:
        across = -(-batch.row_length // 16) * 16 if how.on_gpu else batch.row_length
        total += batch.rows * batch.row_length * across * e
    return total


def _projections(size: Geometry, how: Setup) -> int:
    """Bytes a token: inputs of the linear layers of one layer, and SwiGLU's; o_proj's is the attention's output."""
    e, h, i = how.element, size.hidden, size.intermediate
    gates = (2 if how.use_liger_kernel or how.fuses else 3) * i * e
    if how.lora_r and not how.fused_lora and e == 2:  # float32 copies, one for each layer
        inputs, u = 4 * (5 * h + size.queries + i), 4
    else:
        remade = how.fuses and how.lora_r and how.fused_lora
        inputs, u = e * (2 * h + (0 if remade else i)), e
    return gates + inputs + 7 * how.lora_r * u


def _in_backward(size: Geometry, how: Setup, tokens: int, last_norm: int, again: int) -> int:
    """The larger of two moments, beyond all that the forward kept: the last norm's backward, and the last SwiGLU's.

    There the gradients of gate, up or their product are alive in two copies (three, where one kernel makes two of them
    from the third), and the residual stream's in one, while
    what the last norm kept is gone. again: what is made anew of a layer. The constants are measured (CPU).
    """
    e, h = how.element, size.hidden
    at_norm = h * (2 * e if how.use_liger_kernel or how.fuses else 20 if how.lora_r else {4: 16, 2: 18}[e])
    at_mlp = (1 if how.use_liger_kernel else 3 if how.fuses else 2) * size.intermediate * e + h * e
    if how.lora_r and not how.fused_lora and e == 2:  # the adapters' float32 beside it
        at_mlp += h * (10 if again else 2)
    return max(tokens * at_norm, again + tokens * at_mlp - last_norm)
