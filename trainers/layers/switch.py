"""Which adapter a model computes with, said in one place that all of its fused LoRA layers read.

PEFT's `disable_adapter` and `set_adapter` walk over the whole model and change every layer, there and back, at every
pass of the reference: longer, for a small model, than its forward and backward pass. The place is an object, not a
context variable: a GPU's backward pass recomputes checkpointed layers in a thread of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

NO_ADAPTER = ""


class Switch:
    """adapter: what to compute with in place of each layer's own choice, perhaps `NO_ADAPTER`; None: as they are."""

    def __init__(self) -> None:
        self.adapter: str | None = None
        self.checked: list[Any] = []  # the adapters' configurations for which all layers were found to read it

    @contextlib.contextmanager
    def turned_to(self, adapter: str) -> Iterator[None]:
        """Inside, the layers compute with `adapter`; what they are otherwise set to stays as it is."""
        before, self.adapter = self.adapter, adapter
        try:
            yield
        finally:
            self.adapter = before


def switch_of(model: nn.Module) -> Switch:
    """The one that its layers share, made where there is none yet."""
    if "adapter_switch" not in model.__dict__:
        model.__dict__["adapter_switch"] = Switch()
    return model.__dict__["adapter_switch"]


def reaches_all(switch: Switch, model: Any) -> bool:
    """Whether every adapter of a PEFT model is in a layer that reads `switch`. Looked at again when one is added."""
    configs = list(model.peft_config.values())
    if len(configs) != len(switch.checked) or any(a is not b for a, b in zip(configs, switch.checked, strict=True)):
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        biased = any(getattr(config, "bias", "none") != "none" for config in configs)  # of which PEFT warns
        whole = bool(layers) and not biased and all(m.__dict__.get("switch") is switch for m in layers)
        switch.checked = configs if whole else []
    return bool(switch.checked)


@contextlib.contextmanager
def computing_with(model: Any, adapter: str) -> Iterator[None]:
    """Inside, a PEFT model computes with one of its adapters, which does not train there, or with `NO_ADAPTER`."""
    switch = switch_of(model)
    if reaches_all(switch, model):
        with switch.turned_to(adapter):
            yield
    elif adapter == NO_ADAPTER:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter)
        try:
            yield
        finally:
            model.set_adapter("default")  # makes it trainable again, and the other frozen


def set_training(module: nn.Module, mode: bool) -> None:
    """`module.train(mode)`, without `nn.Module`'s recursion through generators and its slow `__setattr__`."""
    waiting: list[nn.Module | None] = [module]
    while waiting:
        one = waiting.pop()
        if one is None:
            continue
        own = type(one).train
        if own is not nn.Module.train and (own is not PreTrainedModel.train or one.use_kernels):
            one.train(mode)  # does more, or goes elsewhere
            continue
        state = one.__dict__
        state["training"] = mode
        waiting.extend(state["_modules"].values())
