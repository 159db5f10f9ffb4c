"""TRL's trainers and transformers' own, as `check_trainer` asks them: a tiny model with LoRA under SGD, in float32.

`trl_trainer("dpo")` and `transformers_trainer` are its `fn`. They begin with the same model each time and take the rows
in their order. Two processes they cannot be asked for here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from logratio.reference._trl_drive import DEFAULTS, built
from logratio.reference.trainer_laws import Trained, sgd
from logratio.trainers.policy.tiny import tiny_tokenizer

from ..randoms import random_model

Rows = list[dict[str, Any]]
KINDS = {"sft": "sequence", "kto": "labeled", "grpo": "grouped", "listwise": "grouped"}
"""method -> the kind of its rows; the others' are paired."""
MAX_LENGTH = 128


def text_of(ids: list[int]) -> str:
    """A digit an id, which is a token a digit for the tiny tokenizer."""
    return "".join(map(str, ids))


def text_rows(rows: Rows) -> Rows:
    """The rows in TRL's formats, but for rollouts; `row` makes prompts different that are not."""
    parts = ("prompt", "completion", "chosen", "rejected", "reference")
    said: Rows = [{k: text_of(v) if k in parts else v for k, v in row.items() if k != "row"} for row in rows]
    for row in said:
        if "completions" in row:
            row["completions"] = [text_of(one) for one in row["completions"]]
    return said


def rollout_rows(rows: Rows, eos: int) -> Rows:
    """A row a completion, its advantage against the mean of the group's rewards."""
    return [
        {"prompt_ids": ids_of(row["prompt"]), "completion_ids": [*ids_of(said), eos], "advantage": reward - mean}
        for row in rows
        for mean in [sum(row["rewards"]) / len(row["rewards"])]
        for said, reward in zip(row["completions"], row["rewards"], strict=True)
    ]


def ids_of(ids: list[int]) -> list[int]:
    """Of the tiny tokenizer, whose ids are bytes."""
    return list(text_of(ids).encode())


class Watch(TrainerCallback):
    """What a trainer of transformers does, step by step: its losses, and the gradient of its first step."""

    def __init__(self, trainer: Any) -> None:
        self.losses: list[float] = []
        self.gradient: dict[str, Tensor] = {}
        self.so_far = 0.0
        step = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            loss = step(*args, **kwargs)
            self.so_far += loss.item()
            return loss

        trainer.training_step = training_step
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses.append(self.so_far)
        self.so_far = 0.0
        if not self.gradient:
            self.gradient = gradient_of(kwargs["model"])


def gradient_of(model: Any) -> dict[str, Tensor]:
    """A copy, of every parameter that trains."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}


def watched(trainer: Any, learning_rate: float) -> Trained:
    """Train it to its end."""
    watch = Watch(trainer)
    start = copied(trainer.model)
    trainer.train()
    trained = set(gradient_of(trainer.model))
    return Trained(watch.losses, start, copied(trainer.model), trained, watch.gradient, sgd(learning_rate))


def copied(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def options_of(batch_size: int, steps: int, micro_batch_size: int, seed: int, learning_rate: float) -> dict[str, Any]:
    """Fields of transformers' TrainingArguments."""
    return {
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": batch_size // micro_batch_size,
        "max_steps": steps,
        "seed": seed,
        "learning_rate": learning_rate,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
    }


def tiny(adapters: float = 0.5) -> Any:
    """adapters: the scale of B; at 0, as in a fresh adapter, the policy is its reference."""
    return random_model(LlamaConfig, 3, adapters)


def trl_trainer(method: str, adapters: float = 0.5, **options: Any) -> Callable[..., Trained]:
    """TRL's trainer of a method. adapters: see `tiny`. options: fields of its configuration."""

    def fn(
        rows: Rows, *, batch_size: int, steps: int, micro_batch_size: int, seed: int, learning_rate: float = 0.05
    ) -> Trained:
        tokenizer, each = tiny_tokenizer(), 1
        if method == "grpo":
            each = len(rows[0]["completions"])
            rows = rollout_rows(rows, tokenizer.eos_token_id)
            rows = (rows * steps * batch_size * each)[
                : steps * batch_size * each
            ]  # its sampler makes whole windows only
        else:
            rows = text_rows(rows)
        said = options_of(batch_size * each, steps, micro_batch_size * each, seed, learning_rate)
        with built(method, tiny(adapters), tokenizer, rows, None, MAX_LENGTH, {**said, **options}) as trainer:
            return watched(trainer, learning_rate)

    return fn


def transformers_trainer(
    rows: Rows, *, batch_size: int, steps: int, micro_batch_size: int, seed: int, learning_rate: float = 0.05
) -> Trained:
    """transformers' Trainer, with the loss of its model and labels of -100 where nothing is scored."""
    data = [{k: ids_of(v) for k, v in row.items() if k in ("prompt", "completion")} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        said = options_of(batch_size, steps, micro_batch_size, seed, learning_rate)
        arguments = TrainingArguments(folder, remove_unused_columns=False, **{**DEFAULTS, **said})
        trainer = Trainer(tiny(), arguments, train_dataset=data, data_collator=collated)
        trainer.remove_callback(PrinterCallback)
        return watched(trainer, learning_rate)


def collated(rows: Rows) -> dict[str, Tensor]:
    """Padded on the right."""
    prompts, said = ([row[part] for row in rows] for part in ("prompt", "completion"))
    ids = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, said, strict=True)]
    labels = [torch.tensor([-100] * len(p) + completion) for p, completion in zip(prompts, said, strict=True)]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(line) for line in ids], batch_first=True),
    }
