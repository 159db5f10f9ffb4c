"""Builds TRL's trainers as a user would, in float32 on a CPU, silent, leaving nothing behind."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import logging
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from transformers import PrinterCallback

from ._trl_batches import ROLLOUT_METHODS, Rows, next_rollouts
from ._trl_sampling import sampled

TRL_VERSION = "1.16.0"
"""The version whose trainers the project is compared with; another may differ in tokenization or formula."""

METHODS = {
    "sft": ("trl", "SFT"),
    "dpo": ("trl", "DPO"),
    "kto": ("trl", "KTO"),
    "orpo": ("trl.experimental.orpo", "ORPO"),
    "cpo": ("trl.experimental.cpo", "CPO"),
    "tpo": ("trl.experimental.tpo", "TPO"),
    "grpo": ("trl", "GRPO"),
    "rloo": ("trl", "RLOO"),
    "gmpo": ("trl.experimental.gmpo", "GMPO"),
}
"""method -> the module and the name of its trainer and configuration."""


@contextmanager
def built(
    method: str, model: Any, tokenizer: Any, rows: Rows, ref_model: Any, max_length: int, options: dict[str, Any]
) -> Iterator[Any]:
    """TRL's trainer on a copy of the model, ready for the loss of its first batch or for training."""
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ValueError("the comparison with TRL is in float32: call model.float() first")
    if method not in ROLLOUT_METHODS:
        options = dict(options, max_length=max_length)
        with constructed(method, model, tokenizer, list(map(dict, rows)), options, ref_model=ref_model) as trainer:
            if len(trainer.train_dataset) != len(rows):
                raise ValueError(
                    f"TRL dropped {len(rows) - len(trainer.train_dataset)} of {len(rows)} rows, which have nothing to "
                    f"score within max_length={max_length}: take them out or raise max_length"
                )
            yield trainer
        return
    beta = options.get("beta", 0.0)
    if method == "rloo" and beta:
        raise ValueError(f"beta={beta}: RLOO subtracts the KL from its rewards, none is in its loss; see advantages()")
    if beta and any(row.get("ref_per_token_logps") is None for row in rows):
        raise ValueError(f"beta={beta} needs ref_per_token_logps in every row")
    # The log-probs of the reference come with the rows: at beta 0 the trainer makes no model of its own for it.
    window = options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1)
    options = dict(options, beta=0.0, num_generations=window)
    rewards = [lambda completions, **_: [0.0] * len(completions)]
    prompts = [{"prompt": "."}] * len(rows)
    with constructed(method, model, tokenizer, prompts, options, reward_funcs=rewards) as trainer:
        trainer.beta = beta
        finish = functools.partial(sampled, trainer)
        trainer._prepare_inputs = next_rollouts(method, rows, trainer.args, tokenizer.pad_token_id, finish)
        yield trainer


DEFAULTS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "optim": "adamw_torch",
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Fields of TRL's configuration, unless the options say otherwise."""


@contextmanager
def constructed(
    method: str,
    model: Any,
    tokenizer: Any,
    data: list[dict[str, Any]],
    options: dict[str, Any],
    *,
    copied: bool = True,
    **arguments: Any,
) -> Iterator[Any]:
    """The trainer alone. An option that is None is left at TRL's default; tuples become TRL's lists.

    copied: on copies of the models. TRL changes those that it gets, in their forward and their adapters.
    """
    trainer_class, config_class = _classes(method)
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if v is not None}
    clone = copy.deepcopy if copied else lambda model: model
    model = clone(model)
    if method in ("dpo", "kto"):
        ref_model = arguments.pop("ref_model")
        own = ref_model is None and not isinstance(model, PeftModel)
        arguments["ref_model"] = copy.deepcopy(model) if own else clone(ref_model)
    else:
        arguments.pop("ref_model", None)
    with _quietly(), tempfile.TemporaryDirectory() as folder:
        args = config_class(output_dir=folder, **{**DEFAULTS, **options})
        trainer = _silenced(trainer_class)(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=tokenizer,
            **arguments,
        )
        trainer.remove_callback(PrinterCallback)
        if isinstance(model, PeftModel) and "ref" in model.peft_config:
            model.delete_adapter("ref")
        yield trainer


def _classes(method: str) -> tuple[Any, Any]:
    """Trainer and configuration of a method, after a look at TRL's version."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown, expected one of: {', '.join(METHODS)}")
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version != TRL_VERSION:
        raise ImportError(
            f"the comparison with TRL needs trl=={TRL_VERSION}, found {version}: "
            "pip install -e '.[reference]' in the checkout"
        )
    module, name = METHODS[method]
    with _quietly():
        found = import_module(module)
        return getattr(found, f"{name}Trainer"), getattr(found, f"{name}Config")


def _silenced(trainer_class: Any) -> Any:
    """The same trainer without its usage report, which asks the network."""
    return type(trainer_class.__name__, (trainer_class,), {"_send_telemetry": lambda self: None})


@contextmanager
def _quietly() -> Iterator[None]:
    """No bars, logs or warnings inside; Python's, NumPy's and torch's random states are put back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    bars, disabled_level = datasets.is_progress_bar_enabled(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_level)
        if bars:
            datasets.enable_progress_bars()
        random.setstate(python_state)
        np.random.set_state(numpy_state)
