"""From a configuration to everything the loop needs, in the order in which things can go wrong cheaply."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from transformers import get_scheduler

from logratio.losses import Kind

from .checkpoints.checkpoint import Checkpoint, open_checkpoint
from .checkpoints.output_dir import check_output, clear
from .checkpoints.tensors import fingerprint
from .config import RunConfig
from .data.examples import Report, prepare, prepare_prompts
from .data.rows import Rows, load_rows
from .errors import UserError
from .health import Health
from .optimizer import make_optimizer, trained_parameters
from .policy.adapters import add_adapters
from .policy.dropout import describe as describe_dropout
from .policy.load import check_trainable, load_model
from .policy.policy import Policy
from .policy.reference import autocast_of, make_reference, reference_model
from .policy.reference_sync import ReferenceSync, make_sync
from .policy.sharing import share_prompts
from .policy.tiny import TINY
from .preflight import check_before, describe_stuck, read_model
from .rollout.calling import TrainerState
from .rollout.ends import name_ends
from .rollout.rewards import load_rewards
from .rollout.rollouts import Rollouts
from .step import Step

UNTRAINED = (
    "the embedded model has random weights, so it is never right and rewards have nothing to compare: train it with "
    "`logratio train sft` first, and give its output_dir as --model_name_or_path"
)


@dataclass
class Data:
    """train, evaluation: examples, or prompts where the loss learns from rollouts. notes: what to tell the user.

    skipped: the rows that were left out, as skipped_rows.jsonl lists them. fingerprint: of all of them and their order.
    """

    train: list[Any]
    evaluation: list[Any]
    notes: list[str]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    fingerprint: str = ""


@dataclass
class Run:
    """Everything the loop works with. trained: the parameters that an update changes, in the policy's order."""

    config: RunConfig
    accelerator: Accelerator
    tokenizer: Any
    policy: Policy
    step: Step
    data: Data
    rollouts: Rollouts | None
    trained: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    total_steps: int
    notes: list[str]
    health: Health
    reference_sync: ReferenceSync | None = None
    checkpoint: Checkpoint | None = None  # to go on from
    frozen: str = ""  # fingerprint of what does not train


def build(config: RunConfig) -> Run:
    """Raises UserError for whatever in the configuration, the data or the model does not fit."""
    accelerator = start_accelerator(config.train.mixed_precision)
    config = config.resolved(accelerator.num_processes)
    check_output(config)
    checkpoint, checkpoint_notes = open_checkpoint(config, accelerator)
    set_seed(config.train.seed)
    tokenizer, shapes, model_notes = read_model(config)
    data = load_data(config, tokenizer)
    rewards = load_rewards(config.rollout.reward_funcs, data.train[0].columns) if config.rollout else {}
    total_steps = count_steps(len(data.train), config, accelerator.num_processes)
    model_notes += check_before(config, [*data.train, *data.evaluation], shapes, total_steps)

    policy, notes = make_policy(config, accelerator.device)
    notes += name_ends(policy.causal_lm, tokenizer, data.train)
    wrapped = accelerator.prepare_model(policy)
    reference, reference_notes = make_reference(config, policy, wrapped, data.train, accelerator)
    sync, sync_notes = make_sync(config, policy, reference, accelerator, total_steps)
    step = Step(
        accelerator,
        policy,
        wrapped,
        config.loss,
        reference,
        micro_batch_tokens=config.train.micro_batch_tokens,
        max_length=config.data.max_length,
        pad_id=tokenizer.pad_token_id,
    )
    rollouts = None
    if config.rollout:
        per_epoch = -(-len(data.train) // (config.train.batch_size or 1)) * config.rollout.num_iterations
        state = TrainerState(max_steps=total_steps, steps_per_epoch=per_epoch)
        limit = config.loss.max_completion_length
        shared: dict[str, Any] = {"state": state, "accelerator": accelerator, "seed": config.train.seed}
        rollouts = Rollouts(policy, tokenizer, config.rollout, rewards, limit, **shared)
        if config.model.model_name_or_path == TINY and not config.model.adapter_name_or_path:
            notes.append(UNTRAINED)
    trained = trained_parameters(policy)
    optimizer = make_optimizer(trained, config.train, accelerator.device)
    if config.train.overwrite_output_dir and accelerator.is_main_process:
        clear(Path(config.train.output_dir))
    scheduler = get_scheduler(config.train.lr_scheduler_type, optimizer, config.train.warmup_steps, total_steps)
    return Run(
        config=config,
        accelerator=accelerator,
        tokenizer=tokenizer,
        policy=policy,
        step=step,
        data=data,
        rollouts=rollouts,
        trained=trained,
        optimizer=accelerator.prepare_optimizer(optimizer),
        scheduler=scheduler,
        total_steps=total_steps,
        notes=[*checkpoint_notes, *data.notes, *model_notes, *notes, *reference_notes, *sync_notes],
        health=Health(config.loss, shapes[0].rows, config.train.max_grad_norm, config.train.output_dir),
        reference_sync=sync,
        checkpoint=checkpoint,
        frozen=fingerprint(policy, reference_model(reference)),
    )


def start_accelerator(mixed_precision: str) -> Accelerator:
    """The Accelerator; UserError where a launcher's processes would not find each other."""
    AcceleratorState._reset_state()  # else a process's first run decides the precision of all that follow
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=1)
    except ValueError as error:
        raise UserError(f"--mixed_precision {mixed_precision}: {error}") from error
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != accelerator.num_processes:
        raise UserError(
            f"the launcher started {world} processes but accelerate sees {accelerator.num_processes}: each would train "
            "alone; on CPUs set ACCELERATE_USE_CPU=true and launch with torchrun"
        )
    return accelerator


def load_data(config: RunConfig, tokenizer: Any) -> Data:
    """The examples to train on and to evaluate on, and what became of the rows."""
    options, kind = config.data, config.loss.kind
    train, evaluation = load_rows_of(config, options.dataset_train_split), None
    if options.dataset_test_split:
        evaluation = load_rows_of(config, options.dataset_test_split)

    def tokenized(rows: Rows) -> tuple[list[Any], Report]:
        if kind is Kind.GROUPED:
            return prepare_prompts(rows, tokenizer, max_length=options.max_length, on_bad_row=options.on_bad_row)
        return prepare(
            rows,
            kind,
            tokenizer,
            max_length=options.max_length,
            completion_only_loss=options.completion_only_loss,
            assistant_only_loss=options.assistant_only_loss,
            gold=config.loss.scores_gold,
            on_bad_row=options.on_bad_row,
        )

    examples, report = tokenized(train)
    held_out: list[Any] = []
    notes, skipped = [str(report)], report.skipped
    if evaluation is not None:
        held_out, report = tokenized(evaluation)
        notes.append(str(report))
        skipped += report.skipped
    elif options.eval_size:
        if options.eval_size >= len(examples):
            raise UserError(f"--eval_size {options.eval_size} leaves nothing of {len(examples)} examples to train on")
        order = list(range(len(examples)))
        random.Random(config.train.seed).shuffle(order)
        held_out = [examples[i] for i in sorted(order[: options.eval_size])]
        examples = [examples[i] for i in sorted(order[options.eval_size :])]
        notes.append(f"{len(held_out)} examples held out for evaluation, {len(examples)} left to train on")
    if config.loss.window_pass == "mismatched" and len(held_out) == 1:
        raise UserError(
            f"{config.method} cannot be evaluated on a single example, whose prompt needs another's completion"
        )
    return Data(examples, held_out, notes, skipped, fingerprint_of([*examples, *held_out]))


def fingerprint_of(items: Sequence[Any]) -> str:
    """Of examples or prompts and their order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def load_rows_of(config: RunConfig, split: str) -> Rows:
    """One split of the run's data set."""
    return load_rows(
        config.data.dataset_name,
        config.loss.kind,
        split=split,
        config=config.data.dataset_config,
        seed=config.train.seed,
        keep_bad=config.data.on_bad_row == "skip",
    )


def count_steps(num_examples: int, config: RunConfig, num_processes: int = 1) -> int:
    """Optimizer steps of the run. UserError where a step of an epoch would be too small for its loss."""
    batch_size = config.train.batch_size
    assert batch_size is not None
    smallest = num_examples % batch_size or batch_size
    made = f"{num_examples} examples in steps of --batch_size {batch_size} make a step of {smallest}"
    if config.loss.window_pass == "mismatched" and smallest == 1:
        raise UserError(
            f"{made}, in which {config.method} cannot pair its prompt with another's completion; "
            "choose another batch_size"
        )
    if config.rollout and smallest < num_processes:
        raise UserError(f"{made}, which cannot be dealt to {num_processes} processes; choose another batch_size")
    per_epoch = -(-num_examples // batch_size)
    iterations = config.rollout.num_iterations if config.rollout else 1
    return config.train.max_steps or max(1, round(per_epoch * config.train.num_train_epochs * iterations))


def batches(
    items: Sequence[Any], batch_size: int, *, shuffle: bool, seed: int, start: Mapping[str, int] | None = None
) -> Iterator[tuple[list[Any], dict[str, int]]]:
    """Steps of `batch_size` items for ever, each epoch in an order of its own; an epoch's last step may be smaller.

    Yields with each of them the position behind it, of which any may be the `start`.
    """
    epoch, offset = (start["epoch"], start["offset"]) if start else (0, 0)
    while True:
        order = list(range(len(items)))
        if shuffle:
            random.Random(f"{seed}-{epoch}").shuffle(order)
        for begin in range(offset, len(order), batch_size):
            yield [items[i] for i in order[begin : begin + batch_size]], {"epoch": epoch, "offset": begin + batch_size}
        epoch, offset = epoch + 1, 0


def make_policy(config: RunConfig, device: torch.device) -> tuple[Policy, list[str]]:
    """The policy on its device, and what to tell about it."""
    notes: list[str] = []
    model = load_model(config.model, device, seed=config.train.seed, notes=notes)
    frozen_copy = config.wants_reference and config.model.ref_model_name_or_path is None
    model = add_adapters(model, config.model, frozen_copy=frozen_copy)
    check_trainable(model)
    compared = config.wants_reference or config.rollout is not None
    notes += [*describe_dropout(model, compared=compared), *describe_stuck(model, config)]
    temperature = config.rollout.temperature if config.rollout else 1.0
    policy = Policy(model, temperature=temperature, stats=config.loss.stats)
    notes += share_prompts(policy, config.model.attn_implementation, autocast_of(config))
    policy.train()
    return policy, notes
