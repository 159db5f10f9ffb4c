"""Drives the installed TRL trainers on given weights and rows, in float32 on a CPU: losses, gradients, trajectories.

Nothing of TRL is copied: its trainer is built as a user would build it, tokenizes the rows itself, and is asked for
the loss of its own first batch (`loss_and_grads`), for one optimizer step's gradient in several micro-batches
(`micro_batched`), or trained for some steps (`train`); `advantages` runs its way from rewards to advantages. The model
that is passed is copied first, and never changed. It should have no dropout: SFT, GRPO, RLOO and GMPO leave it on.

Rows are in TRL's own data set formats (TPO's have a third completion under "reference"), with one exception. Those of
grpo, rloo and gmpo are rollouts, one a completion, since what is checked is the loss and not the sampling:

    {"prompt_ids": [...], "completion_ids": [...], "advantage": 0.7,
     "old_per_token_logps": [...], "ref_per_token_logps": [...], "sampling_per_token_logps": [...]}

These lists of log-probabilities have one number a completion token. Without the old ones the rollout is taken as on
policy, which hides most mistakes: the value of the loss then hardly depends on the weights (rloo refuses). The
reference ones are needed where beta is not 0. Those of the sampler (GRPO's alone) are taken for vLLM's.

The reference of DPO and KTO is the model under its adapters, as TRL has it for an adapter that it makes itself.
(Given a model that has one already, TRL copies the adapter and takes the copy for its reference; for a fresh adapter
this is the same.) Without adapters it is a frozen copy of the model. `ref_model` replaces either.

Options are the fields of TRL's configurations, under their names. What a user should know of them in TRL 1.16:
cpo's "alphapo" is "simpo" with cpo_alpha set to 0, whatever was asked for. rloo's beta acts on rewards only, and is
refused here. gmpo ignores delta, the off-policy mask, the entropy bonus, use_bias_correction_kl and the importance
sampling level. delta acts on grpo, bnpo, dr_grpo, dapo and luspo only. tpo with tpo_alpha 0 never sees the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._trl_advantages import advantages
from ._trl_batches import ROLLOUT_METHODS, Rows, Scored, rollouts, unpadded
from ._trl_drive import METHODS, TRL_VERSION, built
from ._trl_sampling import sampled

__all__ = ["METHODS", "TRL_VERSION", "Result", "Trajectory", "advantages", "loss_and_grads", "micro_batched", "train"]


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
    scaled: bool = True,
    **loss_options: Any,
) -> Result:
    """TRL's loss of one batch that holds all `rows`, and its gradient.

    scaled: whether the scale is wanted; for rollouts it takes a pass over each of them. Otherwise it is |loss|.
    loss_options: fields of TRL's configuration, such as beta or loss_type; one that is None is left at TRL's default.
    Raises ImportError where trl is not the pinned version, ValueError where TRL would drop some of the rows.
    """
    # the trainers of rollouts refuse to be built for fewer than two completions; their batch is then made by hand
    rolled = method in ROLLOUT_METHODS
    options = dict(loss_options, per_device_train_batch_size=max(2, len(rows)) if rolled else len(rows))
    with built(method, model, tokenizer, rows, ref_model, max_length, options) as trainer:
        policy = trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        pad = trainer.processing_class.pad_token_id

        def batch_of(rows: Rows) -> dict[str, Tensor]:
            return sampled(trainer, rows, rollouts(method, rows, pad))

        batch = batch_of(rows) if rolled else next(iter(trainer.get_train_dataloader()))
        sequences = unpadded(method, batch, gold=loss_options.get("tpo_alpha") != 0 and method == "tpo")
        loss = trainer.compute_loss(policy, batch)
        loss.backward()
        stored = trainer._stored_metrics if method in ("orpo", "cpo") else trainer._metrics
        metrics = {name: float(np.mean(values)) for name, values in stored["train"].items()}
        scale = abs(loss.item())
        if rolled and scaled:
            with torch.no_grad():
                alone = [trainer.compute_loss(policy, batch_of([row])) for row in rows]
            scale = float(torch.stack(alone).abs().mean())
        return Result(loss.item(), scale, _gradient(model, policy), metrics, sequences)


def micro_batched(
    method: str,
    model: Any,
    tokenizer: Any,
    rows: Rows,
    parts: int,
    *,
    max_length: int = 1024,
    ref_model: Any = None,
    **loss_options: Any,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one optimizer step of TRL on all `rows`, cut into `parts` micro-batches of equal size.

    They are what TRL's user gets with gradient_accumulation_steps=parts: the trainer collects the micro-batches, counts
    the window's tokens, and takes a training step with each; the losses that it reports are added up.
    """
    if len(rows) % parts:
        raise ValueError(f"{len(rows)} rows cannot be cut into {parts} equal parts")
    options = dict(loss_options, per_device_train_batch_size=len(rows) // parts, gradient_accumulation_steps=parts)
    with built(method, model, tokenizer, rows, ref_model, max_length, options) as trainer:
        trainer.current_gradient_accumulation_steps = parts
        batches, tokens = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), parts, trainer.args.device)
        loss = sum(trainer.training_step(trainer.model, batch, tokens).item() for batch in batches)
        return loss, _gradient(model, trainer.model)


def _gradient(model: Any, trained: Any) -> dict[str, Tensor]:
    """The gradient of every parameter of the copy that is trainable in `model`."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in trained.named_parameters()
        if name in trainable
    }


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
    with built(method, model, tokenizer, rows, ref_model, max_length, options) as trainer:
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        losses, norms = ([log[name] for log in logs] for name in ("loss", "grad_norm"))
        return Trajectory(losses, norms, logs, trainer.model)
