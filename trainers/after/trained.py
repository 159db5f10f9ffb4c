"""A model or a run's folder, loaded as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging

from ..config import ModelConfig
from ..errors import UserError
from ..policy.adapters import add_adapters
from ..policy.load import load_model, load_tokenizer
from ..policy.tiny import TINY

Dtype = Literal["float32", "bfloat16", "float16"]


def device_of(asked: str) -> torch.device:
    """A GPU where there is one and nothing else is asked for."""
    return torch.device("cuda" if asked == "auto" and torch.cuda.is_available() else asked.replace("auto", "cpu"))


def base_of(path: str) -> str | None:
    """The base model that a folder's adapter names; None where the folder holds no adapter."""
    config = Path(path) / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        named = json.loads(config.read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{config} cannot be read: {error}") from error
    if not named:
        raise UserError(f"{config} names no base model (base_model_name_or_path)")
    return str(named)


def was_quantized(path: str) -> dict[str, bool]:
    """How the run that left the folder had the weights under its adapter: the option that says so; empty: plainly, or
    no run has left it. Raises UserError where that cannot be read: on other weights the adapter is another model."""
    settings = Path(path) / "run_config.json"
    if not settings.exists():
        return {}
    try:
        said = json.loads(settings.read_text()).get("model")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{settings} cannot be read, which says on which weights the adapter was trained (load_in_4bit): put the "
            "file of this run back, or remove it where they were not quantized"
        ) from error
    return {name: True for name in ("load_in_4bit", "load_in_8bit") if isinstance(said, dict) and said.get(name)}


def load_trained(path: str, dtype: Dtype, device: torch.device, *, dequantize: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a hub name, a folder with a model, or one with an adapter, on top of the base that it was
    trained on: quantized weights where the run had them. Raises UserError where there is none.

    dequantize: in their place the weights that they stand for.
    """
    logging.disable_progress_bar()  # of reading and writing weights, in the middle of what a command prints
    base = base_of(path)
    quantized = was_quantized(path) if base else {}
    config = ModelConfig(
        model_name_or_path=base or path,
        adapter_name_or_path=path if base else None,
        dtype=dtype,
        fused_lora=False,  # what is merged is PEFT's
        load_in_4bit=quantized.get("load_in_4bit", False),
        load_in_8bit=quantized.get("load_in_8bit", False),
    )
    model = load_model(config, device)
    if dequantize:
        model = model.dequantize(getattr(torch, dtype))
    model = add_adapters(model, config, frozen_copy=False) if base else model
    own = base is None or (Path(path) / "tokenizer_config.json").is_file()
    return model.eval(), load_tokenizer(path if own and path != TINY else base or TINY)
