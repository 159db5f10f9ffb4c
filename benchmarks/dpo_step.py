"""DPO steps with LoRA, ours beside TRL's: same weights, rows, order and optimizer, in one process, interleaved.

    python -m logratio.benchmarks.dpo_step --model FOLDER --data preference.jsonl

A step is everything between two batches of token ids: packing, reference, forward, backward, clipping, AdamW. The
gradients of the first batch are compared before anything is timed. Prints one JSON line; the ratio is of the sums of
the steps' times, each the median over the rounds.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import tyro

from logratio.losses import DPOLoss
from logratio.trainers.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from logratio.trainers.loop import update
from logratio.trainers.setup import Run, build


@dataclass
class Options:
    """What is measured."""

    model: str
    """Folder or hub name of a causal language model."""
    data: str
    """Preference rows, as a .jsonl file."""
    rows: int = 32
    """The first so many rows are used."""
    batch_size: int = 4
    """Pairs of a step."""
    rounds: int = 3
    """Times that every step is run; medians are taken."""
    lora_r: int = 16
    """Rank of the adapters of all linear layers."""
    max_length: int = 1024
    """As in training."""
    threads: int = 2
    """Of torch."""


def main(options: Options) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    run = ours(options)
    batches = [run.data.train[i : i + options.batch_size] for i in range(0, options.rows, options.batch_size)]
    trainer, trl_batches = trl_trainer(options, run)
    difference = compare_gradients(run, batches[0], trainer, trl_batches[0])
    print(f"gradients of the first batch differ by {difference:.1e}, relative", flush=True)
    optimizer = trainer.create_optimizer()
    times: dict[str, list[list[float]]] = {"logratio": [], "trl": []}
    for _ in range(options.rounds):
        for rows in times.values():
            rows.append([])
        for mine, theirs in zip(batches, trl_batches, strict=True):
            times["logratio"][-1].append(seconds(lambda m=mine: our_step(run, m)))  # type: ignore[misc]
            times["trl"][-1].append(seconds(lambda t=theirs: trl_step(trainer, optimizer, t)))  # type: ignore[misc]
    sums = {name: sum(map(statistics.median, zip(*rows, strict=True))) for name, rows in times.items()}
    row = {
        "case": "dpo_step",
        "ratio_trl_to_logratio": sums["trl"] / sums["logratio"],
        "grad_rel_err": difference,
        "sum_of_step_medians_s": sums,
        "options": vars(options),
        "dtype": "float32",
        "shared_prefix": run.policy.shared,
        "cpu": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "accelerate")},
    }
    print(json.dumps(row))
    return row


def ours(options: Options) -> Run:
    """The run that `logratio train dpo` would make, with adapters that are not zero."""
    config = RunConfig(
        method="dpo",
        loss=DPOLoss(),
        model=ModelConfig(model_name_or_path=options.model, lora_r=options.lora_r),
        data=DataConfig(dataset_name=options.data, shuffle=False, max_length=options.max_length),
        train=TrainConfig(batch_size=options.batch_size, learning_rate=1e-5, lr_scheduler_type="constant"),
    )
    run = build(config)
    torch.manual_seed(0)
    for name, parameter in run.policy.named_parameters():
        if "lora_B" in name:  # zero at the start, which would leave lora_A without a gradient to compare
            torch.nn.init.normal_(parameter, std=1e-3)
    return run


def our_step(run: Run, examples: list[Any]) -> None:
    micros = run.step.micro_batches(examples)
    run.step(micros, run.step.totals(examples, micros))
    update(run, examples)


def trl_trainer(options: Options, run: Run) -> tuple[Any, list[Any]]:
    """TRL's trainer on a copy of the same weights, and its collated batches in the same order."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    warnings.simplefilter("ignore")
    with open(options.data) as file:
        rows = [json.loads(line) for line, _ in zip(file, range(options.rows), strict=False)]
    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-5,
        max_length=options.max_length,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=copy.deepcopy(run.policy.model),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=run.tokenizer,
    )
    data: Any = trainer.train_dataset
    batches = [
        trainer.data_collator([data[i] for i in range(start, start + options.batch_size)])
        for start in range(0, options.rows, options.batch_size)
    ]
    trainer.current_gradient_accumulation_steps = 1
    return trainer, batches


def trl_step(trainer: Any, optimizer: Any, batch: Any) -> None:
    trainer.training_step(trainer.model, batch)
    torch.nn.utils.clip_grad_norm_([p for p in trainer.model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def compare_gradients(run: Run, examples: list[Any], trainer: Any, batch: Any) -> float:
    """Relative error of our whole gradient against TRL's, both without clipping. Neither has seen a step yet."""
    # A PEFT model that is handed to TRL gets a frozen copy of its adapter as the reference; ours has the adapters off.
    # Switch TRL's off too, so that both compute the same.
    if "ref" in trainer.model.peft_config:
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B.ref" in name:
                    parameter.zero_()
    micros = run.step.micro_batches(examples)
    run.step(micros, run.step.totals(examples, micros))
    trainer.training_step(trainer.model, batch)
    mine = dict(run.policy.model.named_parameters())
    theirs = dict(trainer.model.named_parameters())
    names = [name for name, p in mine.items() if p.requires_grad]
    ours = torch.cat([mine[name].grad.flatten() for name in names])  # type: ignore[union-attr]
    other = torch.cat([theirs[name].grad.flatten() for name in names])  # type: ignore[union-attr]
    for model in (run.policy.model, trainer.model):
        model.zero_grad()
    return ((ours - other).norm() / other.norm()).item()


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
