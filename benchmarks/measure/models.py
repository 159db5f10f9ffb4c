"""Models to measure: random weights in published shapes, or a folder; whole, with LoRA, or with QLoRA."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from logratio.trainers.layers.nf4 import keep_layout
from logratio.trainers.policy.tiny import tiny_model

from ..memory.shapes import SHAPES, shape

LORA_R = 16
LORA_ALPHA = 32


def build(
    name: str,
    adapter: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    lora_r: int = LORA_R,
    vocab_size: int | None = None,
) -> Any:
    """A model to train, with random weights if `name` is "tiny" or in `SHAPES`, else what the folder holds.

    adapter: "full", "lora" (on all linear layers but the head, float32, B small but not zero), or "qlora" (the same
    over frozen nf4 weights, doubly quantized). The forward is PEFT's. vocab_size: instead of the published one.
    """
    torch.manual_seed(seed)
    sizes = {} if vocab_size is None else {"vocab_size": vocab_size}
    if name == "tiny":
        model: Any = tiny_model(seed, **sizes)
    elif name in SHAPES:
        with device:
            model = AutoModelForCausalLM.from_config(shape(name, **sizes), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    model = model.to(device=device, dtype=dtype)
    if adapter == "full":
        return model
    return with_adapters(model, adapter, lora_r)


def with_adapters(model: Any, adapter: str = "lora", lora_r: int = LORA_R) -> Any:
    """`model` under fresh adapters, in place; see `build`."""
    if adapter == "qlora":
        quantize(model)
    lora = LoraConfig(r=lora_r, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model.requires_grad_(False), lora)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:  # zero at the start, which would leave lora_A without a gradient
                parameter.normal_(std=1e-3)
    return model


def quantize(model: Any) -> None:
    """Make the linear layers nf4, all but the head, in place and one at a time, as loading from a folder would."""
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not torch.nn.Linear or layer is head:
                continue
            compute = torch.float32 if layer.weight.device.type == "cpu" else torch.bfloat16
            with torch.device("meta"):
                four = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=layer.bias is not None,
                    compute_dtype=compute,
                    compress_statistics=True,
                    quant_type="nf4",
                )
            device = layer.weight.device
            weight: Any = bnb.nn.Params4bit(
                layer.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            four.weight = weight.to(device)
            four.bias = layer.bias
            setattr(parent, name, four)
    keep_layout(model)
    model.is_loaded_in_4bit = True  # PEFT asks for it
