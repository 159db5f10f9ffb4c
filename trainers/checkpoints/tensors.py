"""What training carries along besides weights, as named tensors and JSON: safetensors can hold no other, and nothing
that is read back can run code."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES = 256  # values of each tensor that a fingerprint looks at


def optimizer_state(optimizer: Any, names: Mapping[int, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({parameter/key: tensor}, what else there is). names: of parameters, by id."""
    state = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            name = f"{order[index]}/{key}"
            if isinstance(value, Tensor):
                tensors[name] = value.detach().cpu().contiguous()
            else:
                values[name] = value
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
    return tensors, {"groups": groups, "values": values}


def load_optimizer_state(
    optimizer: Any, names: Mapping[int, str], tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """The inverse; the optimizer has the same parameters, perhaps in another order."""
    order = {name: i for i, name in enumerate(names[id(p)] for g in optimizer.param_groups for p in g["params"])}
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**rest["values"], **tensors}.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(order[parameter], {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, rest["groups"], strict=True):
        group |= {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state(device: torch.device) -> dict[str, Any]:
    """Of Python's, NumPy's and torch's generators in this process, on the CPU and on its GPU."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if device.type == "cuda":
        state["cuda"] = bytes(torch.cuda.get_rng_state(device).tolist()).hex()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """The inverse."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8), device)


def fingerprint(*modules: nn.Module | None) -> str:
    """Of what stays as it is: names, shapes, dtypes and evenly spaced values of the parameters that do not train.

    Not of every value: that would read a large model once more at every start.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, parameter in () if module is None else sorted(module.named_parameters()):
            if parameter.requires_grad:
                continue
            flat = parameter.detach().flatten()
            at = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(flat[at.to(flat.device)].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
