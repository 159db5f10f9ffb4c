"""Loading: a model and its tokenizer, quantized or not, with the adapters that a run trains."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ..config import ModelConfig
from ..errors import UserError
from ..ground.given import given
from ..layers.fused import fuse_layers
from ..layers.int8 import keep_product
from ..layers.liger import check_liger, use_liger
from ..layers.nf4 import keep_layout
from .checks import check_finite, check_folder, check_loaded, foreign
from .reach import loaded
from .tiny import TINY, tiny_model, tiny_tokenizer


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Inside, transformers shows no progress of reading and writing weights; after it, what it did before."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            with warnings.catch_warnings():  # of HF_HUB_DISABLE_PROGRESS_BARS, which goes before
                warnings.simplefilter("ignore")
                logging.enable_progress_bar()


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of `name`, with a padding token (see `pad_within` for one that the model does not know)."""
    if name == TINY:
        return tiny_tokenizer()
    if (own := given(name)) is not None:
        return complete(own.tokenizer, own.name)
    found = loaded(AutoTokenizer, name, f"no tokenizer could be loaded from {name!r}", revision=revision)
    return complete(found, name)


def complete(tokenizer: Any, name: str) -> Any:
    """The tokenizer, with a token to pad with. UserError where it has none to end with."""
    if tokenizer.eos_token_id is None:
        whose = f"of {name!r}" if name else "that was given (processing_class=)"
        raise UserError(
            f"the tokenizer {whose} has no EOS token, so no completion could end: set its eos_token, to one that the "
            "model knows"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad_within(tokenizer: Any, rows: int, name: str) -> list[str]:
    """Let the tokenizer pad with a token that has one of the embeddings' `rows`; returns what to tell about it.

    Nothing attends to padding, but it is looked up all the same. UserError where EOS itself has no row.
    """
    if tokenizer.eos_token_id >= rows:
        raise UserError(
            f"the tokenizer's EOS token {tokenizer.eos_token!r} ({tokenizer.eos_token_id}) has no row in the "
            f"embeddings of {name!r}, which end at {rows - 1}; use the tokenizer that belongs to the model"
        )
    if tokenizer.pad_token_id < rows:
        return []
    old, pad = tokenizer.pad_token, tokenizer.pad_token_id
    tokenizer.pad_token = tokenizer.eos_token
    return [
        f"the padding token {old} ({pad}) has no row in the model's embeddings, which end at {rows - 1}: "
        f"{tokenizer.eos_token} ({tokenizer.eos_token_id}) is used instead, in the saved tokenizer too"
    ]


def load_model(
    config: ModelConfig,
    device: torch.device,
    *,
    seed: int = 0,
    name: str | None = None,
    notes: list[str] | None = None,
) -> Any:
    """The bare model on `device`, without adapters. name: another model than `config.model_name_or_path`.

    notes: what is to be told of its files is added to it.
    """
    if config.use_liger_kernel:
        check_liger(device)
    name = name or config.model_name_or_path
    revision = config.model_revision if name == config.model_name_or_path else None
    model, said = _load(config, device, seed, name, revision)
    keep_layout(model)  # not of --load_in_4bit alone: a folder may hold nf4 weights
    keep_product(model)
    check_finite(model, repr(name))
    if notes is not None:
        notes += said
    if config.use_liger_kernel:
        use_liger(model)
    elif config.fused_layers:
        fuse_layers(model)
    return model


def _load(
    config: ModelConfig, device: torch.device, seed: int, name: str, revision: str | None = None
) -> tuple[Any, list[str]]:
    quantized = config.load_in_4bit or config.load_in_8bit
    if name == TINY and not quantized:
        tiny: Any = tiny_model(seed)
        if config.attn_implementation:
            with foreign(f"--attn_implementation {config.attn_implementation}"):
                tiny.set_attn_implementation(config.attn_implementation)
        return tiny.to(device=device, dtype=getattr(torch, config.dtype)), []
    if name == TINY:  # quantization happens while loading from a folder
        with tempfile.TemporaryDirectory() as folder:
            tiny_model(seed).save_pretrained(folder)
            return _load(config, device, seed, folder)
    if (own := given(name)) is not None:
        if own.model is None:
            return _load(config, device, seed, own.name, revision)
        return own.take(device), []
    check_architecture(name, revision=revision)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if config.load_in_8bit:
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if config.load_in_4bit:
        # a CPU multiplies in bfloat16 far slower than in float32
        compute = torch.float32 if device.type == "cpu" else torch.bfloat16
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of missing weights; what is wrong with them is said by `check_loaded`
    try:
        what = f"the model {name!r} could not be loaded"
        model, info = loaded(AutoModelForCausalLM, name, what, revision=revision, **options)
    finally:
        logging.set_verbosity(verbosity)
    notes = check_loaded(name, info)
    return (model if quantized else model.to(device)), notes


def check_architecture(name: str, option: str = "--model_name_or_path", revision: str | None = None) -> Any:
    """The configuration of `name`; UserError unless it is one of a decoder-only language model of text."""
    config: Any
    own = given(name)
    if own is not None and own.model is not None:
        config = own.model.config
    else:
        name = name if own is None else own.name
        check_folder(name, option)
        nowhere = "" if Path(name).is_dir() else f", which is no folder here (looked in {Path.cwd()})"
        what = f"no model configuration could be loaded from {name!r}{nowhere}"
        config = loaded(AutoConfig, name, what, revision=revision)
    if config.is_encoder_decoder:
        raise UserError(f"{name!r} is an encoder-decoder ({config.model_type}); only decoder-only models are supported")
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        raise UserError(
            f"{name!r} is not a model of text alone ({config.model_type}); only language models are supported"
        )
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{name!r} ({config.model_type}) is not a causal language model that transformers knows")
    return config


def check_trainable(model: Any) -> None:
    """Raise UserError where nothing trains, or where the model adds a loss of its own that we would leave out."""
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("no parameter of the model is trainable")
    if getattr(model.config, "output_router_logits", False):
        raise UserError(
            "the model adds a router loss (output_router_logits), which is not supported: set it to false in its "
            "config.json to train without"
        )


def describe(model: Any) -> str:
    """One line: the class, and how many parameters it has and trains."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in counts), sum(n for n, on in counts if on)
    name = type(model.get_base_model() if hasattr(model, "peft_config") else model).__name__
    return f"{name}, {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M of them trained"
