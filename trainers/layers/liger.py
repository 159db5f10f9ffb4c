"""Liger-Kernel's RMSNorm, SwiGLU and RoPE in a loaded model, without its losses."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import is_liger_kernel_available

from ..errors import UserError

# Of TRL's and transformers' default selection, what leaves the LM head and the loss to us.
KERNELS = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


def check_liger(device: torch.device) -> None:
    """Raise UserError where the kernels cannot run."""
    if not is_liger_kernel_available():
        raise UserError('--use_liger_kernel needs the package liger-kernel: pip install -e ".[liger]" in the checkout')
    if device.type == "cpu":
        raise UserError("--use_liger_kernel needs a GPU, whose kernels it consists of; leave it out")


def use_liger(model: Any) -> None:
    """Put the kernels into `model`, and into every later model of its architecture in this process.

    UserError where Liger-Kernel has none for the architecture.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"--use_liger_kernel: liger-kernel has no kernels for {model.config.model_type}; leave it out")
    _apply_liger_kernel_to_instance(model=model, **KERNELS)
