"""The optimizer's state as safetensors and JSON, and a fingerprint of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..processes.sharding import reshard, whole

SAMPLES = 256  # values of each tensor that a fingerprint looks at


def flat(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({parameter/key: tensor}, what else there is) of what `optimizer_state` returns."""
    entries = [(f"{name}/{key}", value) for name, own in state["state"].items() for key, value in own.items()]
    tensors = {name: value.contiguous() for name, value in entries if isinstance(value, Tensor)}
    values = {name: value for name, value in entries if not isinstance(value, Tensor)}
    return tensors, {"param_groups": state["param_groups"], "values": values}


def nested(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse, of JSON too, which has lists for a pair of numbers."""
    state: dict[str, dict[str, Any]] = {}
    for name, value in {**rest["values"], **tensors}.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(parameter, {})[key] = value
    groups = [
        {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}
        for group in rest["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def fingerprint(*modules: nn.Module | None) -> str:
    """Of what stays as it is: names, shapes, dtypes and evenly spaced values of the parameters that do not train.

    Not of every value: that would read a large model once more at every start. Called on every process.
    """
    digest = hashlib.sha256()
    for module in filter(None, modules):
        reshard(module)
        for name, parameter in sorted(module.named_parameters()):
            if parameter.requires_grad:
                continue
            values = whole(parameter.detach()).flatten()
            at = torch.linspace(0, len(values) - 1, min(SAMPLES, len(values)), dtype=torch.float64).long()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(values[at.to(values.device)].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
