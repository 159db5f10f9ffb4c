"""What is checked of model files and weights, so that no run ends in another library's traceback."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ..errors import UserError, counted, first_line

# Of a matrix, how many weights are asked whether a step can move them.
SAMPLED_WEIGHTS = 4096


@contextlib.contextmanager
def foreign(what: str) -> Iterator[None]:
    """Whatever a library raises inside becomes a UserError that begins with `what`."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of tokenizers, safetensors, huggingface_hub, json, peft: any type at all
        known = isinstance(error, OSError | ValueError | ImportError)
        kind = "" if known and str(error).strip() else f"{type(error).__name__}: "
        raise UserError(f"{what}: {kind}{first_line(error).rstrip(': ')}") from error  # which began a list


def check_folder(name: str, option: str = "--model_name_or_path") -> None:
    """Raise UserError where a local folder is no model, or has a weights file that is cut or corrupt."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_file():
            raise UserError(f"{option} {name} is a file; give the folder that it lies in")
        if name.startswith((".", "/", "~")) or name.count("/") > 1:  # which no name on the hub does
            raise UserError(f"{option} {name} does not exist (looked in {Path.cwd()})")
        return
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise UserError(
                f"{option} {name} holds an adapter, not a model: give {_base_of(folder)} as {option} and this folder "
                "as --adapter_name_or_path"
            )
        raise UserError(f"{option} {name} holds no model: the folder has no config.json")
    for path in sorted(folder.glob("*.safetensors")):
        check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Raise UserError where the file is cut or its header broken; its numbers are not read."""
    from safetensors import safe_open

    what = f"the weights file {path} is cut or corrupt and cannot be read; copy it again"
    with foreign(what), safe_open(path, "pt"):
        pass


def _base_of(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if base := json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path"):
            return str(base)
    return "its base model"


def check_loaded(name: str, info: dict[str, Any]) -> list[str]:
    """Raise UserError where `from_pretrained` left weights random; returns what to tell of those that it left out."""
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            f"the model {name!r} could not be loaded: {key} is {tuple(stored)} in its files and {tuple(wanted)} by its "
            "config.json"
        )
    if missing := sorted(info["missing_keys"]):
        lacking = f"its files lack {counted(len(missing), 'weight')}, the first {missing[0]}"
        raise UserError(f"the model {name!r} could not be loaded: {lacking}; they would be random")
    if unused := sorted(info["unexpected_keys"]):
        return [
            f"the model does not use {counted(len(unused), 'weight')} in the files of {name}, the first {unused[0]}"
        ]
    return []


@torch.no_grad()
def check_finite(model: nn.Module, whose: str, *, trained_only: bool = False) -> None:
    """Raise UserError where weights are NaN or infinite, naming the first of them."""
    for name, weight in model.named_parameters():
        if (trained_only and not weight.requires_grad) or not weight.is_floating_point() or weight.is_meta:
            continue
        if weight.sum(dtype=torch.float32).isfinite():
            continue
        bad = int((~weight.isfinite()).sum())
        if bad:  # else the sum alone overflowed
            kind = "NaN" if weight.isnan().any() else "infinite"
            raise UserError(
                f"the weights of {whose} are broken: {bad} of the {weight.numel()} numbers of {name} are {kind}; "
                "use another checkpoint"
            )


@torch.no_grad()
def stuck(model: nn.Module, learning_rate: float) -> float:
    """Of the trained weights in 16 bits, the part that adding `learning_rate`, about AdamW's step, leaves as it is."""
    still = total = 0.0
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
            flat = weight.detach().flatten()
            some = flat[:: max(1, len(flat) // SAMPLED_WEIGHTS)]
            moved = (some.float() + learning_rate).to(some.dtype)
            still += float((moved == some).float().mean()) * weight.numel()
            total += weight.numel()
    return still / total if total else 0.0


def skeleton(config: Any, name: str) -> Any:
    """The model of a configuration without its weights: names and shapes."""
    with foreign(f"the configuration of {name!r} makes no model"), torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)


def learned_positions(model: nn.Module) -> int | None:
    """How many positions a table of learned ones has, or None where positions are computed (RoPE, ALiBi)."""
    words = model.get_input_embeddings()  # type: ignore[operator]
    tables = [
        (module.num_embeddings - getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not words and is_positional(name.rpartition(".")[2])
    ]
    return min(tables, default=None)


def is_positional(name: str) -> bool:
    return "pos" in name or name == "wpe"
