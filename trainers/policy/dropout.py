"""Dropout that a model or a loaded adapter brings along, and how training goes without it.

A ratio of policy and reference, or of the policy now and then, is to say what training changed. With dropout in the one
and not in the other it says first of all which units were dropped: at learning rate 0 DPO's loss is not ln 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# Of heads that a causal language model does not have, though its configuration gives them a rate.
OTHER_HEADS = ("summary", "classifier")
JITTER = ("jitter_noise", "input_jitter_noise")


def rates(model: nn.Module) -> dict[str, float]:
    """Name -> rate of every dropout of the model that is not 0: of its modules by their last name, and of rates that
    modules keep as plain numbers (`attention_dropout`); else those that they may read from the configuration."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd):
            if module.p:
                found[last_word(name)] = float(module.p)
            continue
        found |= _numbers(module)
    configured = [entry for config in _configs(model) for entry in _numbers(config).items()]
    return found or {name: rate for name, rate in configured if not name.startswith(OTHER_HEADS)}


def switch_off(model: nn.Module) -> dict[str, float]:
    """Set every rate to 0; returns what `rates` was before. What is saved keeps its own, see `as_configured`."""
    found, configured = rates(model), []
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name in _numbers(module):
            setattr(module, name, 0.0)
        adapters = getattr(module, "lora_dropout", None)
        if isinstance(adapters, nn.ModuleDict):  # as PEFT makes them at rate 0, which is what fused layers look for
            for name in adapters:
                adapters[name] = nn.Identity()
    for config in _configs(model):
        for name, rate in _numbers(config).items():
            setattr(config, name, 0.0)
            configured.append((config, name, rate))
    model.__dict__["dropout_off"] = (found, configured)
    return found


@contextlib.contextmanager
def as_configured(model: nn.Module) -> Iterator[None]:
    """Inside, the configuration has the rates that it had before `switch_off`: the saved model's own."""
    configured = [entry for _, configured in _switched_off(model) for entry in configured]
    for config, name, rate in configured:
        setattr(config, name, rate)
    try:
        yield
    finally:
        for config, name, _ in configured:
            setattr(config, name, 0.0)


def describe(model: nn.Module, *, compared: bool) -> list[str]:
    """What to tell of the dropout that is on, and was switched off. compared: the loss compares with log-probs of
    before, which have none."""

    def listed(found: dict[str, float]) -> str:
        return ", ".join(f"{name} {rate:g}" for name, rate in sorted(found.items()))

    notes = []
    if off := {name: rate for found, _ in _switched_off(model) for name, rate in found.items()}:
        notes.append(f"dropout is off in training ({listed(off)}); --disable_dropout False keeps it")
    if compared and (on := rates(model)):
        notes.append(f"dropout is on in training ({listed(on)}) but not in what the policy is compared with")
    return notes


def last_word(name: str) -> str:
    """Of a module's path, the last name that says something: `lora_dropout` of `q_proj.lora_dropout.default`."""
    words = [word for word in name.split(".") if "drop" in word]
    return words[-1] if words else name.rpartition(".")[2]


def _numbers(thing: Any) -> dict[str, float]:
    """Its attributes that are rates of dropout, or of the noise with which experts are chosen in training."""
    named = {name: value for name, value in vars(thing).items() if "drop" in name or name in JITTER}
    return {name: value for name, value in named.items() if isinstance(value, float) and 0 < value <= 1}


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a transformers model, with those nested in them, each once."""
    found: dict[int, Any] = {}
    waiting = [module.config for module in model.modules() if hasattr(module, "config")]
    while waiting:
        config = waiting.pop()
        if hasattr(config, "__dict__") and hasattr(config, "to_dict") and id(config) not in found:
            found[id(config)] = config
            waiting += vars(config).values()
    return list(found.values())


def _switched_off(model: nn.Module) -> list[tuple[dict[str, float], list[tuple[Any, str, float]]]]:
    """What `switch_off` left on the model, or on the one that adapters were put on: what it found and changed."""
    return [module.__dict__["dropout_off"] for module in model.modules() if "dropout_off" in module.__dict__]
