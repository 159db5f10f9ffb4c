"""8-bit layers that compute the same whoever asks."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def keep_product(model: nn.Module) -> None:
    """Let 8-bit layers on a CPU multiply as in training always.

    In training bitsandbytes multiplies dequantized weights there, and out of it rounds its inputs to 8 bits: reference,
    rollouts and evaluations would be of another model than what learns. On a GPU it rounds them in both.
    """
    for module in model.modules():
        kind: Any = type(module)
        if kind.__name__ == "Linear8bitLt" and module.weight.device.type != "cuda":  # type: ignore[union-attr]
            module.__class__ = in_training(kind)
            module.train()


@functools.cache
def in_training(kind: Any) -> Any:
    """A class of 8-bit layers, always in the mode of training, in which they have nothing that is random."""

    def train(self: Any, mode: bool = True) -> Any:
        return kind.train(self, True)

    return type(kind.__name__, (kind,), {"train": train, "__module__": kind.__module__})
