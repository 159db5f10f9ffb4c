"""A model or a run's folder, loaded as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging

from ..checkpoints.checkpoint import STATE
from ..checkpoints.output_dir import BASE_MODEL
from ..config import ModelConfig
from ..errors import UserError
from ..policy.adapters import add_adapters
from ..policy.load import check_architecture, load_model, load_tokenizer
from ..policy.tiny import TINY

Dtype = Literal["float32", "bfloat16", "float16"]


def device_of(asked: str) -> torch.device:
    """A GPU where there is one and nothing else is asked for."""
    return torch.device("cuda" if asked == "auto" and torch.cuda.is_available() else asked.replace("auto", "cpu"))


def base_of(path: str) -> str | None:
    """The base model that a folder's adapter names; None where the folder holds no adapter."""
    return based_on(path)[0]


def based_on(path: str) -> tuple[str | None, str | None]:
    """As `base_of`, and of a hub name the revision.

    Of the embedded model it is the one in the run's own folder, wherever that has been moved since.
    """
    config = Path(path) / "adapter_config.json"
    if not config.is_file():
        return None, None
    try:
        said = json.loads(config.read_text())
        named, revision = said.get("base_model_name_or_path"), said.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{config} cannot be read: {error}") from error
    if not named:
        raise UserError(f"{config} names no base model (base_model_name_or_path)")
    folder = Path(path).resolve()
    beside = (folder / BASE_MODEL, folder.parent / BASE_MODEL)  # of a run, of a checkpoint in it
    found = next((own for own in beside if own.is_dir() and Path(named).name == BASE_MODEL), named)
    return str(found), revision


def was_quantized(path: str) -> dict[str, bool]:
    """How the run that left the folder had the weights under its adapter: the option that says so; empty: plainly, or
    no run has left it. path: of a run or of one of its checkpoints.

    Raises UserError where that cannot be read: on other weights the adapter is another model."""
    settings = next((file for name in ("run_config.json", STATE) if (file := Path(path) / name).exists()), None)
    if settings is None:
        return {}
    try:
        whole = json.loads(settings.read_text())
        said = (whole.get("config", {}) if settings.name == STATE else whole).get("model")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{settings} cannot be read, which says on which weights the adapter was trained (load_in_4bit): put the "
            "file of this run back, or remove it where they were not quantized"
        ) from error
    return {name: True for name in ("load_in_4bit", "load_in_8bit") if isinstance(said, dict) and said.get(name)}


def check_base(path: str, base: str | None, revision: str | None = None) -> None:
    """Raise UserError, which says who names it, where there is no such model."""
    if (base or path) == TINY:
        return
    try:
        check_architecture(base or path, "the model", revision)
    except UserError as error:
        named = f"{path}: the base model that its adapter_config.json names (base_model_name_or_path): "
        raise UserError(f"{named if base else ''}{error}") from error


def load_trained(path: str, dtype: Dtype, device: torch.device, *, dequantize: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a hub name, a folder with a model, or one with an adapter, on top of the base that it was
    trained on: quantized weights where the run had them. Raises UserError where there is none.

    dequantize: in their place the weights that they stand for.
    """
    logging.disable_progress_bar()  # of reading and writing weights, in the middle of what a command prints
    base, revision = based_on(path)
    quantized = was_quantized(path) if base else {}
    check_base(path, base, revision)
    config = ModelConfig(
        model_name_or_path=base or path,
        model_revision=revision,
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
    if base is None or (Path(path) / "tokenizer_config.json").is_file():
        return model.eval(), load_tokenizer(path)
    return model.eval(), load_tokenizer(base, revision)
