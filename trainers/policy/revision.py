"""Which commit of the Hub's a model's name stands for: a run keeps to it, and what it saves says it.

A branch may move while a run trains, between a kill and going on, or before its adapter is loaded: each would find
other weights under the same name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from ..config import ModelConfig
from ..errors import UserError
from ..ground.given import given
from .adapters import check_adapter
from .load import check_architecture
from .tiny import TINY


def pinned(config: ModelConfig, began: str | None = None) -> ModelConfig:
    """The same model, with the commit as its revision where it is the Hub's. began: the commit that the run began with.

    UserError where the model is not the Hub's and a revision is given, or one that is another than the run began with.
    """
    name, asked = config.model_name_or_path, config.model_revision
    own = given(name)
    if own is not None and own.model is None:  # a name that came with a tokenizer
        name, own = own.name, None
    if name == TINY or own is not None or Path(name).is_dir():
        if asked is None:
            return config
        raise UserError(f"--model_revision {asked} is of a model on the Hub, which {name} is not; leave it out")
    commit = commit_of(name, asked or began or of_adapter(config))
    if began is not None and commit != began:
        raise UserError(
            f"--model_revision {asked} is the commit {commit}, and the run began with {began}: leave it out"
        )
    return dataclasses.replace(config, model_revision=commit)


def of_adapter(config: ModelConfig) -> str | None:
    """The revision of the model that the adapter to go on with was trained on, if it is of this model and says it."""
    if config.adapter_name_or_path is None:
        return None
    theirs = check_adapter(config.adapter_name_or_path)
    return theirs.revision if theirs.base_model_name_or_path == config.model_name_or_path else None


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a branch, a tag or a commit of the Hub's is now, or offline that of its cache.

    The revision itself where the cache does not tell."""
    check_architecture(name, revision=revision)  # whose file is of that commit in the cache then
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else revision
