"""The states of all that is random in a process: Python's, NumPy's and torch's generators, on the CPU and its GPU."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch


def random_states(device: torch.device) -> dict[str, Any]:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """The inverse; a GPU's state is left out where there is no GPU, and stays as it is where `states` has none."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def as_json(states: Mapping[str, Any]) -> dict[str, Any]:
    """The states as plain values."""
    version, internal, gauss = states["python"]
    kind, keys, *rest = cast(tuple[Any, ...], states["numpy"])
    tensors = {name: bytes(states[name].tolist()).hex() for name in ("torch", "cuda") if name in states}
    return {"python": [version, list(internal), gauss], "numpy": [kind, keys.tolist(), *rest], **tensors}


def from_json(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse."""
    version, internal, gauss = plain["python"]
    kind, keys, *rest = plain["numpy"]
    tensors = {
        name: torch.frombuffer(bytearray.fromhex(plain[name]), dtype=torch.uint8)
        for name in ("torch", "cuda")
        if name in plain
    }
    numpy = (kind, np.array(keys, dtype=np.uint32), *rest)
    return {"python": (version, tuple(internal), gauss), "numpy": numpy, **tensors}
