"""Loading: a model and its tokenizer, quantized or not, with the adapters that a run trains."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..config import ModelConfig
from ..errors import UserError, first_line
from .liger import check_liger, use_liger
from .policy import REFERENCE_ADAPTER
from .tiny import tiny_model, tiny_tokenizer

TINY = "tiny"


def load_tokenizer(name: str) -> Any:
    """The tokenizer of `name`, with a padding token."""
    if name == TINY:
        return tiny_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer could be loaded from {name!r}: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name!r} has no EOS token, so no completion could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig, device: torch.device, *, seed: int = 0, name: str | None = None) -> Any:
    """The bare model on `device`, without adapters. name: another model than `config.model_name_or_path`."""
    if config.use_liger_kernel:
        check_liger(device)
    model = _load(config, device, seed, name or config.model_name_or_path)
    if config.use_liger_kernel:
        use_liger(model)
    return model


def _load(config: ModelConfig, device: torch.device, seed: int, name: str) -> Any:
    if name == TINY and not config.load_in_4bit:
        tiny: Any = tiny_model(seed)
        if config.attn_implementation:
            tiny.set_attn_implementation(config.attn_implementation)
        return tiny.to(device=device, dtype=getattr(torch, config.dtype))
    if name == TINY:  # quantization happens while loading from a folder
        with tempfile.TemporaryDirectory() as folder:
            tiny_model(seed).save_pretrained(folder)
            return _load(config, device, seed, folder)
    check_architecture(name)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
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
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"the model {name!r} could not be loaded: {first_line(error)}") from error
    return model if config.load_in_4bit else model.to(device)


def check_architecture(name: str) -> None:
    """Raise UserError unless `name` is a decoder-only language model of text."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"no model configuration could be loaded from {name!r}: {first_line(error)}") from error
    if config.is_encoder_decoder:
        raise UserError(f"{name!r} is an encoder-decoder ({config.model_type}); only decoder-only models are supported")
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        raise UserError(
            f"{name!r} is not a model of text alone ({config.model_type}); only language models are supported"
        )
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{name!r} ({config.model_type}) is not a causal language model that transformers knows")


def add_adapters(model: Any, config: ModelConfig, *, frozen_copy: bool) -> Any:
    """`model` with the adapters that are trained, in float32, or itself where the whole model is.

    frozen_copy: a starting adapter (`adapter_name_or_path`) gets a frozen copy, which is the reference. A fresh one
    gets one where the reference is to follow the policy (`sync_ref_model`), whose product is 0 as its own is.
    """
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not config.adapter_name_or_path and not config.lora_r:
        return model
    if config.adapter_name_or_path:
        model = _load_adapter(model, config.adapter_name_or_path, frozen_copy)
    else:
        model = _fresh_adapter(model, config, frozen_copy and config.sync_ref_model)
    if config.fused_lora:
        from .lora_layers import fuse_lora

        fuse_lora(model)
    return model


def _fresh_adapter(model: Any, config: ModelConfig, frozen_copy: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    targets: Any = list(config.lora_target_modules)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"--lora_target_modules {' '.join(targets)}: {first_line(error)}") from error
    base: Any = wrapped.get_base_model()
    if hasattr(base.get_output_embeddings(), "lora_A"):
        raise UserError("--lora_target_modules names the LM head, whose adapters are not supported; leave it out")
    if frozen_copy:
        random_state = torch.get_rng_state()  # what is drawn later is the same with and without the copy
        wrapped.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(wrapped.peft_config["default"]))
        torch.set_rng_state(random_state)
        wrapped.set_adapter("default")
    return wrapped


def _load_adapter(model: Any, path: str, frozen_copy: bool) -> Any:
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(model, path, is_trainable=True)
        if frozen_copy:
            model.load_adapter(path, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
            model.set_adapter("default")
    except (OSError, ValueError) as error:
        raise UserError(f"no adapter could be loaded from {path!r}: {first_line(error)}") from error
    if hasattr(model.get_base_model().get_output_embeddings(), "lora_A"):  # our head would leave its part out
        raise UserError(f"the adapter in {path!r} is on the LM head too, which is not supported; choose another")
    return model


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
