"""Saving: a PEFT adapter or a full model that `from_pretrained` loads, whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from .config import RunConfig
from .errors import UserError, first_line
from .outputs import BASE_MODEL
from .policy.dropout import as_configured
from .policy.policy import Policy
from .policy.tiny import TINY, tiny_model, tiny_tokenizer


def save_run(
    config: RunConfig,
    policy: Policy,
    tokenizer: Any,
    checkpoint: int | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save into `output_dir`, or its checkpoint-N.

    An adapter of the embedded model comes with that model, in `BASE_MODEL`, and names it as its base.
    """
    output_dir = Path(config.train.output_dir)
    if policy.has_adapters and config.model.model_name_or_path == TINY:
        base = output_dir / BASE_MODEL
        policy.model.peft_config["default"].base_model_name_or_path = str(base.resolve())
        if not (base / "config.json").exists():
            model: Any = tiny_model(config.train.seed)
            own: Any = tiny_tokenizer()
            model.to(dtype=getattr(torch, config.model.dtype))
            write(base, model.save_pretrained, own.save_pretrained)
    save(policy, tokenizer, output_dir if checkpoint is None else output_dir / f"checkpoint-{checkpoint}", weights)


def save(policy: Policy, tokenizer: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the trained adapter (the reference's copy is left out) or the whole model, and the tokenizer.

    weights: of a sharded policy, from `full_weights`.
    """
    options: dict[str, Any] = {"selected_adapters": ["default"]} if policy.has_adapters else {}
    if weights is not None:
        options["state_dict"] = weights

    def model(partial: Path) -> None:
        with as_configured(policy.model), generation_aside(policy, partial):
            policy.model.save_pretrained(partial, **options)

    write(folder, model, tokenizer.save_pretrained)


def write(folder: Path, *writers: Callable[[Path], Any]) -> None:
    """Let all write beside the folder's files first and then move theirs in, so that no file is ever half there.

    Raises UserError where the disk does not take them; what was in the folder is as it was then.
    """
    partial = folder / ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for writer in writers:
            writer(partial)
        for file in partial.iterdir():
            file.replace(folder / file.name)
        partial.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise UserError(f"the model could not be saved in {folder}: {reason}") from error


@contextlib.contextmanager
def generation_aside(policy: Policy, folder: Path) -> Iterator[None]:
    """Inside, a generation_config that transformers refuses to save, because it contradicts itself, is out of the way.

    It is written as the checkpoint had it: it must not cost the trained weights, and is not ours to change.
    """
    model = policy.causal_lm
    own = getattr(model, "generation_config", None)
    if own is None or policy.has_adapters:
        yield
        return
    try:
        own.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            model.generation_config = own
        (folder / "generation_config.json").write_text(own.to_json_string())
    else:
        yield
