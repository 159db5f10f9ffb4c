"""Drives the installed TRL trainers on given weights and rows, in float32 on a CPU: losses, gradients, trajectories.

Nothing of TRL is copied: its trainer is built as a user would build it, tokenizes the rows itself, and is asked for
the loss of its own first batch (`loss_and_grads`) or trained for some steps (`train`). The model that is passed is
copied first, and never changed. It should have no dropout: DPO, KTO and ORPO switch it off, SFT and GRPO do not.

Rows are in TRL's own data set formats, with one exception. GRPO's are rollouts, one a completion, since what is
checked is the loss and not the sampling:

    {"prompt_ids": [...], "completion_ids": [...], "advantage": 0.7,
     "old_per_token_logps": [...], "ref_per_token_logps": [...]}

Both lists of log-probabilities have one number a completion token. Without the old ones the rollout is taken as on
policy, which hides most mistakes: the value of the loss then hardly depends on the weights. The reference ones are
needed where beta is not 0.

The reference of DPO and KTO is the model under its adapters, as TRL has it for an adapter that it makes itself.
(Given a model that has one already, TRL copies the adapter and takes the copy for its reference; for a fresh adapter
this is the same.) Without adapters it is a frozen copy of the model. `ref_model` replaces either.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PrinterCallback

from ._trl_batches import Rows, Scored, next_rollouts, rollouts, unpadded

TRL_VERSION = "1.16.0"
"""The version whose trainers the project is compared with; another may differ in tokenization or formula."""

METHODS = {
    "sft": ("trl", "SFT"),
    "dpo": ("trl", "DPO"),
    "kto": ("trl", "KTO"),
    "orpo": ("trl.experimental.orpo", "ORPO"),
    "grpo": ("trl", "GRPO"),
}
"""method -> the module and the name of its trainer and configuration."""


@dataclass(frozen=True)
class Result:
    """One batch under TRL's loss.

    loss: its value.
    scale: the mean over examples of |loss of the example|, by which an error of the loss should be measured where
        |loss| itself is smaller: examples of GRPO cancel. Everywhere else terms are non-negative and it is the loss.
    grads: the gradient of every trainable parameter, float32, by its name in the model that was passed.
    metrics: what TRL would log, under its names.
    sequences: what the model was fed, in the order of the rows, under "completion" (and KTO's "mismatched", the
        completions for its KL estimate), or "chosen" and "rejected".
    """

    loss: float
    scale: float
    grads: dict[str, Tensor]
    metrics: dict[str, float]
    sequences: dict[str, list[Scored]]


@dataclass(frozen=True)
class Trajectory:
    """A training run, one entry an optimizer step: loss and gradient norm before clipping, and TRL's whole log."""

    losses: list[float]
    grad_norms: list[float]
    logs: list[dict[str, float]]
    model: Any
    """The trained copy."""


def loss_and_grads(
    method: str,
    model: Any,
    tokenizer: Any,
    rows: Rows,
    *,
    max_length: int = 1024,
    ref_model: Any = None,
    **loss_options: Any,
) -> Result:
    """TRL's loss of one batch that holds all `rows`, and its gradient.

    loss_options: fields of TRL's configuration, such as beta or loss_type. Raises ImportError where trl is not the
    pinned version, ValueError where TRL would drop some of the rows.
    """
    # GRPO's trainer refuses to be built for fewer than two completions; its batch is then made by hand
    batch_size = max(2, len(rows)) if method == "grpo" else len(rows)
    options = dict(loss_options, per_device_train_batch_size=batch_size)
    with _trainer(method, model, tokenizer, rows, ref_model, max_length, options) as trainer:
        policy = trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = (
            rollouts(rows, trainer.processing_class.pad_token_id)
            if method == "grpo"
            else next(iter(trainer.get_train_dataloader()))
        )
        sequences = unpadded(method, batch)
        loss = trainer.compute_loss(policy, batch)
        loss.backward()
        stored = trainer._stored_metrics if method == "orpo" else trainer._metrics
        metrics = {name: float(np.mean(values)) for name, values in stored["train"].items()}
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in policy.named_parameters()
            if name in trainable
        }
        scale = abs(loss.item())
        if method == "grpo":
            with torch.no_grad():
                alone = [
                    trainer.compute_loss(policy, rollouts([row], trainer.processing_class.pad_token_id)) for row in rows
                ]
            scale = float(torch.stack(alone).abs().mean())
        return Result(loss.item(), scale, grads, metrics, sequences)


def train(
    method: str,
    model: Any,
    tokenizer: Any,
    rows: Rows,
    *,
    max_steps: int,
    batch_size: int,
    gradient_accumulation_steps: int = 1,
    learning_rate: float,
    lr_scheduler_type: str = "constant",
    warmup_steps: int = 0,
    max_grad_norm: float = 1.0,
    weight_decay: float = 0.0,
    max_length: int = 1024,
    ref_model: Any = None,
    **loss_options: Any,
) -> Trajectory:
    """`max_steps` optimizer steps of TRL's trainer, with torch's AdamW and no gradient checkpointing.

    Each step takes the next `batch_size * gradient_accumulation_steps` rows in their order, and starts again from the
    first when they run out, so that every step is full. KTO's KL completions rotate within blocks of `batch_size`.
    """
    window = batch_size * gradient_accumulation_steps
    repeats = -(-max_steps * window // len(rows))
    rows = (list(rows) * repeats)[: max_steps * window]
    options = dict(
        loss_options,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        lr_scheduler_type=lr_scheduler_type,
        warmup_steps=warmup_steps,
        max_grad_norm=max_grad_norm,
        weight_decay=weight_decay,
    )
    with _trainer(method, model, tokenizer, rows, ref_model, max_length, options) as trainer:
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        losses, norms = ([log[name] for log in logs] for name in ("loss", "grad_norm"))
        return Trajectory(losses, norms, logs, trainer.model)


@contextmanager
def _trainer(
    method: str, model: Any, tokenizer: Any, rows: Rows, ref_model: Any, max_length: int, options: dict[str, Any]
) -> Iterator[Any]:
    """TRL's trainer on a copy of the model, silent, in float32, that leaves nothing behind."""
    trainer_class, config_class = _classes(method)
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ValueError("the comparison with TRL is in float32: call model.float() first")
    model = copy.deepcopy(model)
    arguments: dict[str, Any] = {}
    beta = options.get("beta", 0.0)
    if method in ("dpo", "kto"):
        if ref_model is None and not isinstance(model, PeftModel):
            ref_model = model
        arguments["ref_model"] = copy.deepcopy(ref_model)
    elif method == "grpo":
        # The log-probs of the reference come with the rows: at beta 0 the trainer makes no model of its own for it.
        window = options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1)
        options = dict(options, beta=0.0, num_generations=window)
        arguments["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    if method != "grpo":
        options = dict(options, max_length=max_length)
    data = datasets.Dataset.from_list([{"prompt": "."}] * len(rows) if method == "grpo" else list(map(dict, rows)))
    with _quietly(), tempfile.TemporaryDirectory() as folder:
        args = config_class(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            optim="adamw_torch",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        )
        trainer = _silenced(trainer_class)(
            model=model, args=args, train_dataset=data, processing_class=tokenizer, **arguments
        )
        trainer.remove_callback(PrinterCallback)
        if method == "grpo":
            trainer.beta = beta
            if beta and any(row.get("ref_per_token_logps") is None for row in rows):
                raise ValueError(f"beta={beta} needs ref_per_token_logps in every row")
            trainer._prepare_inputs = next_rollouts(rows, args, tokenizer.pad_token_id)
        elif isinstance(model, PeftModel) and "ref" in model.peft_config:
            model.delete_adapter("ref")
        if len(trainer.train_dataset) != len(rows):
            raise ValueError(
                f"TRL dropped {len(rows) - len(trainer.train_dataset)} of {len(rows)} rows, which have nothing to "
                f"score within max_length={max_length}: take them out or raise max_length"
            )
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
            f"the comparison with TRL needs trl=={TRL_VERSION}, found {version}: pip install 'logratio[reference]'"
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
