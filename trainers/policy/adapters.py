"""The adapters that a run trains: fresh ones, or those of a folder, with a frozen copy where that is the reference."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..config import ModelConfig
from ..errors import UserError, counted, first_line
from ..ground.given import PREFIX, given
from ..processes.sharding import is_sharded
from .checks import check_finite, foreign
from .dropout import switch_off
from .policy import REFERENCE_ADAPTER
from .tiny import TINY

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def add_adapters(model: Any, config: ModelConfig, *, frozen_copy: bool) -> Any:
    """`model` with the adapters that are trained, in float32, or itself where the whole model is.

    frozen_copy: a starting adapter (`adapter_name_or_path`) gets a frozen copy, which is the reference. A fresh one
    gets one where the reference is to follow the policy (`sync_ref_model`), whose product is 0 as its own is.
    """
    config = config.resolved()
    if config.gradient_checkpointing:
        with renamed_in_transformers():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.adapter_name_or_path:
        model = _load_adapter(model, config.adapter_name_or_path, config.model_name_or_path, frozen_copy)
    if config.disable_dropout:  # before there are fresh adapters, and before layers without dropout are fused
        switch_off(model)
    if config.lora_r:
        model = _fresh_adapter(model, config, frozen_copy and config.sync_ref_model)
    if adapters := getattr(model, "peft_config", None):
        adapters["default"].revision = config.model_revision
    if config.fused_lora and (config.lora_r or config.adapter_name_or_path):
        from ..layers.lora_layers import fuse_lora

        fuse_lora(model)
    return model


@contextlib.contextmanager
def renamed_in_transformers() -> Iterator[None]:
    """Without a word on names that transformers 6 will drop: PEFT uses them too, and ours would be unknown to 5.17."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        yield


def _fresh_adapter(model: Any, config: ModelConfig, frozen_copy: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    alpha = config.lora_alpha
    assert alpha is not None and config.lora_dropout is not None and config.lora_target_modules is not None
    targets = list(config.lora_target_modules)
    lora = given(targets[0])  # a program's own
    if lora is None:
        everywhere, beyond = targets == ["all-linear"], not_adaptable(model)
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
            lora_dropout=config.lora_dropout,
            target_modules="all-linear" if everywhere else targets,
            exclude_modules=(beyond or None) if everywhere else None,
            modules_to_save=list(config.lora_modules_to_save or ()) or None,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
            task_type="CAUSAL_LM",
        )
        check_targets(model, targets)
        if named := [name for name in beyond if name in targets]:
            raise UserError(
                f"--lora_target_modules {' '.join(targets)}: no adapter could be added to what {named[0]} returns; "
                "leave it out"
            )
        check_targets(model, list(config.lora_modules_to_save or ()), "lora_modules_to_save")
    try:
        with renamed_in_transformers(), warnings.catch_warnings():  # of what it then does for GPT-2's weights
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # which `check_head` says
            wrapped = get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"--lora_target_modules {' '.join(targets)}: {first_line(error)}") from error
    check_head(wrapped)
    if frozen_copy:
        random_state = torch.get_rng_state()  # what is drawn later is the same with and without the copy
        wrapped.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(wrapped.peft_config["default"]))
        torch.set_rng_state(random_state)
        wrapped.set_adapter("default")
    return wrapped


def not_adaptable(model: Any) -> list[str]:
    """Names of linear layers that PEFT's all-linear takes, and whose adapters would fail or be left out.

    Some return more than a product: experts' routers whom they have chosen, others several blocks. Of Mamba's kind
    the weight itself goes into a kernel, and PEFT refuses the layer.
    """
    kind = getattr(model.config, "model_type", None)
    found = {"out_proj"} if kind in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h") else set()
    for name, module in model.named_modules():
        own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        if not own or type(module).__module__.startswith("bitsandbytes"):  # whose weights have another shape
            continue
        if name.rpartition(".")[2] not in found and not maps_rows(module):
            found.add(name.rpartition(".")[2])
    return sorted(found)


@torch.no_grad()
def maps_rows(module: nn.Linear) -> bool:
    """Whether it makes of each row another, as a linear layer does."""
    try:
        y: Any = module(module.weight.new_zeros(2, module.in_features))
    except (RuntimeError, ValueError, TypeError, IndexError):  # it wants another shape, or more than rows
        return False
    return isinstance(y, torch.Tensor) and y.shape == (2, module.out_features)


def check_head(model: Any) -> None:
    """Raise UserError where new adapters are on the LM head, or a copy of it trains: our head would leave that out."""
    from peft.utils.other import ModulesToSaveWrapper

    head: Any = model.get_base_model().get_output_embeddings()
    if hasattr(head, "lora_A"):
        raise UserError("--lora_target_modules names the LM head, whose adapters are not supported; leave it out")
    if isinstance(head, ModulesToSaveWrapper):
        raise UserError("--lora_modules_to_save names the LM head, which is not trained beside adapters; leave it out")
    for name, module in model.named_modules():
        saved = isinstance(module, ModulesToSaveWrapper)
        own = module.original_module if saved else module
        if own is not head and getattr(own, "weight", None) is head.weight and (saved or hasattr(module, "lora_A")):
            option = "lora_modules_to_save" if saved else "lora_target_modules"
            raise UserError(
                f"--{option} names {name.rpartition('.')[2]}, whose weight is the LM head's too, which is not trained "
                "beside adapters; leave it out"
            )


def describe(model: Any) -> list[str]:
    """What to tell of adapters that are no plain LoRA, or not over plain weights."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    if not hasattr(model, "peft_config"):
        return []
    notes: list[str] = []
    if excluded := model.peft_config["default"].exclude_modules:
        left_out = excluded if isinstance(excluded, str) else ", ".join(sorted(excluded))
        notes.append(f"left without adapters: {left_out}")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    half = ", in float16" if model.device.type == "cuda" else ""  # see layers/int8.py
    kinds = {
        "DoRA": any(layer.lora_variant for layer in layers),
        f"over 8-bit weights{half}": any("8bit" in type(layer).__name__ for layer in layers),
    }
    if any(kinds.values()):
        told = " ".join(name for name, is_so in kinds.items() if is_so)
        notes.append(f"adapters ({told}) compute by PEFT's own forward, which is slower than the fused one")
    saved = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and "default" in module.modules_to_save
    }
    if saved:
        notes.append(f"trained whole, beside the adapters: {', '.join(sorted(saved))}")
    return notes


def refuse_sharded(config: ModelConfig, accelerator: Accelerator) -> None:
    """Raise UserError for adapters that have not been tried over sharded weights."""
    for name in ("use_dora", "lora_modules_to_save", "load_in_8bit"):
        if getattr(config, name) and is_sharded(accelerator):
            raise UserError(
                f"--{name} has not been tried with sharded weights; keep them whole (configs/accelerate/ddp.yaml)"
            )


def check_targets(model: Any, targets: list[str], option: str = "lora_target_modules") -> None:
    """Raise UserError where a name matches no module: PEFT is content if one of several does."""
    if not targets or targets == ["all-linear"] or targets[0].startswith(PREFIX):
        return
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linear = {n.rpartition(".")[2] for n, m in model.named_modules() if getattr(m, "weight", None) is not None}
            raise UserError(
                f"--{option} {' '.join(targets)}: no module of the model is called {target}; it has "
                + ", ".join(sorted(linear))
            )


def check_adapter(path: str) -> Any:
    """Its PeftConfig; UserError where the folder holds no adapter that can be trained, before any model is loaded."""
    from peft import PeftConfig

    folder = Path(path)
    with foreign(f"no adapter could be loaded from {path!r}"):
        for names in (("adapter_config.json",), ADAPTER_WEIGHTS):
            if folder.is_dir() and not any((folder / name).exists() for name in names):
                raise UserError(f"no adapter could be loaded from {path!r}: the folder has no {names[0]}")
        config: Any = PeftConfig.from_pretrained(path)
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
        raise UserError(f"the adapter in {path!r} is of type {kind}, which adds to the prompt; use LoRA or its kin")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise UserError(f"the adapter in {path!r} is for {config.task_type}, not for a causal language model")
    return config


def _load_adapter(model: Any, path: str, base: str, frozen_copy: bool) -> Any:
    from peft import PeftModelForCausalLM

    config = check_adapter(path)
    names = {"default": True, **({REFERENCE_ADAPTER: False} if frozen_copy else {})}
    with foreign(f"no adapter could be loaded from {path!r}"), renamed_in_transformers():
        warnings.filterwarnings("ignore", message=".*(Already found a `peft_config`|missing adapter keys)")
        named = config.base_model_name_or_path
        made_for = f" (it was made for {named!r})" if named and named != base else ""
        fault = f"the adapter in {path!r} does not fit the model {base!r}{made_for}"
        config.inference_mode = False
        renamed = getattr(model, "_checkpoint_conversion_mapping", None)
        try:
            model = PeftModelForCausalLM(model, config, "default")
        except ValueError as error:  # no module of the names that it wants
            raise UserError(f"{fault}: {first_line(error)}") from error
        for name, trained in names.items():
            try:
                result = model.load_adapter(path, adapter_name=name, is_trainable=trained, key_mapping=renamed)
            except RuntimeError as error:
                if "size mismatch" not in str(error):
                    raise
                raise UserError(f"{fault}: {mismatch(error)}") from error
            if keys := result.missing_keys:
                raise UserError(f"{fault}: it lacks {counted(len(keys), 'weight')}, the first {keys[0]}")
            if keys := result.unexpected_keys:
                raise UserError(f"{fault}: it holds {len(keys)} foreign weights, the first {keys[0]}")
        model.set_adapter("default")
    if hasattr(model.get_base_model().get_output_embeddings(), "lora_A"):  # our head would leave its part out
        raise UserError(f"the adapter in {path!r} is on the LM head too, which is not supported; choose another")
    check_finite(model, f"the adapter in {path!r}", trained_only=True)
    if base != TINY:
        model.peft_config["default"].base_model_name_or_path = base  # under which what is saved will be loaded
    return model


def mismatch(error: Exception) -> str:
    """The first of torch's lines on sizes that differ, shorter."""
    line = next(line for line in str(error).splitlines() if "size mismatch" in line)
    return (
        line.strip()
        .replace("copying a param with shape torch.Size", "")
        .replace(" from checkpoint, the shape in current model is torch.Size", " in the file, ")
        .rstrip(".")
        + " in the model"
    )
