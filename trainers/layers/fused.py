"""RMSNorm, SwiGLU and RoPE of a loaded model on a GPU, by fewer kernels and with less kept for the backward pass.

Which of a model's classes are these is not looked up but tried: a class whose modules have the right parts takes the
fused forward where it computes the same. What differs from transformers' own:
1. RMSNorm is torch's fused kernel, which rounds to half precision once, at its end, and keeps its input as it is;
   transformers rounds before the weight, and keeps a float32 copy.
2. SwiGLU is `swiglu.py`'s; a down projection with fused LoRA keeps no product of it either, but makes it again.
3. RoPE is `rope.py`'s, put under the name by which the model's attention calls its own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from .rope import own_function, rotate, rotating, with_rotation
from .swiglu import swiglu

# Elsewhere there is no one kernel to gain.
DEVICES = ("cuda",)
# |fused - own| / |own| on trial, by dtype: some roundings.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
LOW_PRECISION_TOLERANCE = 2e-2
TRIAL_ROWS = 8
# Of rows on trial, whose mean is 1 such: a clamp shows in large ones alone, a mean that is taken out in none around 0.
TRIAL_SIZES = (1, 64)
CLASSES: dict[tuple[type, type], type] = {}


class FusedNorm:
    """In front of a class of RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        if x.dtype != own.weight.dtype:  # whose results' dtype differs from model to model
            return super().forward(x)  # type: ignore[misc]
        return rms_norm(x, own.weight.shape, own.weight, own.variance_epsilon)


class FusedMLP:
    """In front of a class of MLP: down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        gate, up = own.gate_proj(x), own.up_proj(x)
        down = own.down_proj
        return down.of_swiglu(gate, up) if hasattr(down, "of_swiglu") else down(swiglu(gate, up))


class FusedRotation:
    """Marks a class of attention whose RoPE is ours."""


def fused_class(of: type, by: type, **own: Any) -> type:
    """The subclass of a model's class that computes by ours. own: further attributes."""
    if (of, by) not in CLASSES:
        CLASSES[of, by] = type(f"Fused{of.__name__}", (by, of), own)
    return CLASSES[of, by]


def dtype_of(weight: Tensor) -> torch.dtype:
    """In which a layer of this weight is tried: a quantized one in bfloat16."""
    return weight.dtype if weight.is_floating_point() else torch.bfloat16


def fuse_layers(model: nn.Module) -> int:
    """Let RMSNorms, SwiGLU MLPs and the RoPE of attention modules compute fused where that gives the same; how many
    do."""
    verdicts: dict[tuple[Any, ...], bool] = {}
    count = 0
    for module in list(model.modules()):
        count += fuse_rotation(module, verdicts)
        by = kind_of(module)
        if by is None:
            continue
        key = (type(module), type(getattr(module, "act_fn", None)))
        if key not in verdicts:
            verdicts[key] = computes_the_same(module, fused_class(type(module), by))
        if verdicts[key]:
            module.__class__ = fused_class(type(module), by)
            count += 1
    return count


def fuse_rotation(module: Any, verdicts: dict[tuple[Any, ...], bool]) -> bool:
    """Whether the module is attention whose RoPE is computed fused from now on."""
    weight: Any = getattr(module._modules.get("q_proj"), "weight", None)
    of = type(module)
    own = None if weight is None or "forward" in module.__dict__ else own_function(of.forward)
    if own is None or weight.device.type not in DEVICES or issubclass(of, FusedRotation):
        return False
    key = (own, dtype_of(weight))
    if key not in verdicts:
        verdicts[key] = rotates_the_same(*key, weight.device)
    if verdicts[key]:
        module.__class__ = fused_class(of, FusedRotation, forward=with_rotation(of.forward, rotating(own)))
    return verdicts[key]


@torch.no_grad()
def rotates_the_same(own: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model's own function does what `rotate` does, on random heads; False where either raises."""
    draw = torch.Generator().manual_seed(0)
    query, key, angles = (torch.randn(*s, generator=draw) for s in ((2, 3, 5, 16), (2, 1, 5, 16), (2, 5, 8)))
    angles = torch.cat((angles, angles), dim=-1)
    tensors = [x.to(device, dtype) for x in (query, key, angles.cos(), angles.sin())]
    try:
        pairs = zip(rotate(*tensors), own(*tensors), strict=True)
        worst = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
    return worst < TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)


def kind_of(module: Any) -> type | None:
    """What a module may be, by its parts, on a device where that pays. None for one that may be given more than x, as
    Mamba's norms are given a gate."""
    parts = dict(module.named_children())
    if isinstance(module, (FusedNorm, FusedMLP)) or "forward" in module.__dict__:
        return None
    if list(inspect.signature(type(module).forward).parameters)[2:]:
        return None
    weight = getattr(module, "weight", None)
    if not parts and hasattr(module, "variance_epsilon") and isinstance(weight, nn.Parameter) and weight.dim() == 1:
        return FusedNorm if weight.device.type in DEVICES else None
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} == set(parts):
        return FusedMLP if parts["gate_proj"].weight.device.type in DEVICES else None
    return None


@torch.no_grad()
def computes_the_same(module: Any, fused: type) -> bool:
    """Whether it does, on random rows; False where either raises."""
    weight = module.weight if hasattr(module, "weight") else module.gate_proj.weight
    width = len(weight) if weight.dim() == 1 else module.gate_proj.in_features
    dtype = dtype_of(weight)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(TRIAL_ROWS, width, generator=draw).add_(1)
    own_class, was_training, errors = type(module), module.training, []
    module.train()  # or dropout would not be seen
    try:
        for size in TRIAL_SIZES:
            rows = (size * x).to(weight.device, dtype)
            module.__class__ = own_class
            own = module(rows)
            if not own.isfinite().all():  # of large rows in float16: says nothing
                break
            module.__class__ = fused
            errors.append(((module(rows) - own).float().norm() / own.float().norm()).item())
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
    finally:
        module.__class__ = own_class
        module.train(was_training)
    return bool(errors) and all(error < TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE) for error in errors)
