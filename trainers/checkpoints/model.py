"""Saving: a PEFT adapter or a full model that `from_pretrained` loads, whole or not at all."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import GenerationConfig

from ..config import RunConfig
from ..policy.dropout import as_configured
from ..policy.load import load_model
from ..policy.policy import Policy
from ..policy.tiny import TINY, tiny_model, tiny_tokenizer
from ..processes.sharding import is_sharded, load_full_weights
from .folder import set_aside, write_whole
from .output_dir import BASE_MODEL

Weights = dict[str, Tensor] | None


def save_run(config: RunConfig, policy: Policy, tokenizer: Any, weights: Weights = None) -> None:
    """Save into `output_dir`. weights: of a sharded policy, from `full_weights`."""
    with base_model(config, policy):
        save(policy, tokenizer, Path(config.train.output_dir), weights)


@contextlib.contextmanager
def base_model(config: RunConfig, policy: Policy) -> Iterator[None]:
    """Inside, what is saved is saved so that it can be loaded: an adapter of the embedded model names `BASE_MODEL` as
    its base, which is there afterwards; a folder with a base alone would be in the way of the run's next start."""
    if not policy.has_adapters or config.model.model_name_or_path != TINY:
        yield
        return
    base = Path(config.train.output_dir) / BASE_MODEL
    policy.model.peft_config["default"].base_model_name_or_path = str(base.resolve())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file")  # of a base that comes afterwards
        yield
    if base.exists():
        return
    model: Any = tiny_model(config.train.seed)
    model.to(dtype=getattr(torch, config.model.dtype))

    def fill(partial: Path) -> None:
        model.save_pretrained(partial)
        tiny_tokenizer().save_pretrained(partial)

    write_whole(base, fill)


def save(policy: Policy, tokenizer: Any, folder: Path, weights: Weights = None) -> None:
    """Write the trained adapter (the reference's copy is left out) or the whole model, and the tokenizer.

    They are written beside the folder's files first and then moved in, so that no file is ever half there. Raises
    UserError where the disk does not take them; what was in the folder is as it was then.
    """
    partial = folder / ".partial"
    with set_aside(partial, f"the model could not be saved in {folder}"):
        write_model(policy, tokenizer, partial, weights)
        for file in partial.iterdir():
            file.replace(folder / file.name)
        partial.rmdir()


def write_model(policy: Policy, tokenizer: Any, folder: Path, weights: Weights = None) -> None:
    """As `save`, into an empty folder."""
    options: dict[str, Any] = {"selected_adapters": ["default"]} if policy.has_adapters else {}
    if weights is not None:
        options["state_dict"] = weights
    with as_configured(policy.model), generation_aside(policy, folder):
        policy.model.save_pretrained(folder, **options)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's, to be filled in by hand; `logratio report` writes one
    tokenizer.save_pretrained(folder)


def load_weights(config: RunConfig, policy: Policy, folder: Path, accelerator: Accelerator) -> None:
    """Give the policy the trained weights that `write_model` wrote, in place. Called on every process."""
    weights: Mapping[str, Tensor]
    if not policy.has_adapters:
        weights = load_model(config.model, torch.device("cpu"), name=str(folder)).state_dict()
        if is_sharded(accelerator):
            load_full_weights(policy, accelerator, weights)
        else:
            policy.causal_lm.load_state_dict(weights)
        return
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    weights = load_peft_weights(str(folder), device="cpu")
    if is_sharded(accelerator):
        own = [name for name, p in policy.model.named_parameters() if name.replace(".default", "") in weights]
        load_full_weights(policy, accelerator, {name: weights[name.replace(".default", "")] for name in own})
    else:
        set_peft_model_state_dict(policy.model, dict(weights), adapter_name="default")


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
