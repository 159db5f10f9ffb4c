"""The layout of nf4 weights: the one that has a gradient is kept.

On a CPU with AVX512-BF16 bitsandbytes repacks the weight of a `Linear4bit`, for good, in its first forward pass in
evaluation mode. What it multiplies with afterwards is written for inference: nothing goes back through it, and autograd
says nothing. A pass of the reference would be enough, so repacking is switched off where layers are made.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import UserError


def keep_layout(model: nn.Module) -> None:
    """Let bitsandbytes repack no weight of the model from now on."""
    for layer in repackable(model):
        layer.support_avx512bf16_for_cpu = False


def repackable(model: nn.Module) -> list[Any]:
    """The layers whose weights bitsandbytes may repack."""
    return [layer for layer in model.modules() if hasattr(layer, "support_avx512bf16_for_cpu")]


def is_repacked(weight: Tensor) -> bool:
    """Whether a parameter is an nf4 weight in the layout that has no gradient."""
    state: Any = getattr(weight, "quant_state", None)
    return getattr(state, "packing_format_for_cpu", False)


def refuse_repacked(*weights: Tensor) -> None:
    """Raise UserError where one of them is repacked; for weights that are about to pass a gradient on."""
    if any(map(is_repacked, weights)):
        raise UserError(
            "bitsandbytes has repacked nf4 weights of the model for inference on this CPU, and no gradient goes back "
            "through them; call `logratio.trainers.layers.nf4.keep_layout(model)` before the model's first forward pass"
        )
