"""From a configuration to everything the loop needs, in the order in which things can go wrong cheaply."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, set_seed

from .checkpoints.agreement import agreed
from .checkpoints.checkpoint import Checkpoint, open_checkpoint
from .checkpoints.hub import check_push
from .checkpoints.output_dir import check_output, clear
from .checkpoints.tensors import fingerprint
from .config import RunConfig
from .data.table.load import Data, load_data
from .errors import UserError
from .ground.alone import alone
from .growing import Growth, make_growth
from .health import Health
from .logs.trackers import chosen as chosen_trackers
from .optimizer import make_optimizer, make_schedule, trained_parameters
from .policy.adapters import add_adapters, refuse_sharded
from .policy.adapters import describe as describe_adapters
from .policy.configured import configured
from .policy.dropout import describe as describe_dropout
from .policy.load import check_trainable, load_model
from .policy.policy import Policy
from .policy.reference import autocast_of, make_reference, reference_model
from .policy.reference_sync import ReferenceSync, make_sync
from .policy.revision import pinned
from .policy.sharing import share_prompts
from .policy.teacher import make_teacher
from .policy.tiny import TINY
from .preflight import check_before, describe_stuck, read_model
from .processes.launching import check_alike, check_processes, describe_processes, load_everywhere, refuse_untried
from .processes.sharding import describe_whole, wrap
from .processes.watching import watch_over
from .rollout.calling.asked import Reward, TrainerState
from .rollout.ends import name_ends
from .rollout.own.function import Function, load_function
from .rollout.rewards import load_rewards
from .rollout.rollouts import Rollouts
from .step import Step

UNTRAINED = (
    "the embedded model has random weights, so it is never right and rewards have nothing to compare: train it with "
    "`logratio train sft` first, and give its output_dir as --model_name_or_path, one with adapters as "
    "--adapter_name_or_path"
)
UNCORRECTED = (
    "completions are sampled by earlier policies than the one that learns from them, and weigh as if they were not: "
    "--sampling_correction decoupled corrects for it, token_truncate does so within bounds"
)


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
    growth: Growth
    reference_sync: ReferenceSync | None = None
    checkpoint: Checkpoint | None = None  # to go on from
    frozen: str = ""  # fingerprint of what does not train
    configured: str = ""  # of what the models compute beside their weights

    def close(self) -> None:
        """Give back what others keep for the run."""
        if self.rollouts is not None:
            self.rollouts.close()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a pass over the data."""
        return epoch_steps(self.data.epoch_size, self.config)


@alone()
def build(config: RunConfig, *, saves: bool = True) -> Run:
    """Raises UserError for whatever in the configuration, the data or the model does not fit. saves: whether the disk
    is to have room for the trained model."""
    chosen_trackers(config.train.report_to)  # refused here, if at all
    check_push(config.save)
    accelerator = start_accelerator(config.train.mixed_precision, config.train.ddp_timeout)
    refuse_sharded(config.model, accelerator)
    config = agreed(config.resolved(accelerator.num_processes), accelerator)
    check_output(config)
    checkpoint, checkpoint_notes = open_checkpoint(config, accelerator)
    began = checkpoint.state["config"]["model"] if checkpoint else {}
    config = dataclasses.replace(config, model=pinned(config.model, began.get("model_revision")))
    set_seed(config.train.seed)
    tokenizer, shapes, model_notes = read_model(config)
    data = load_data(config, tokenizer, accelerator)
    rewards, rollout_func = load_functions(config, data.train, accelerator.device)
    total_steps = count_steps(data.epoch_size, config, accelerator.num_processes)
    model_notes += check_before(config, [data.train, data.evaluation], shapes, total_steps, saves=saves)

    policy, notes = make_policy(config, accelerator.device)
    notes += name_ends(policy.causal_lm, tokenizer, data.train)
    # before it is sharded: the optimizer's parameters become the sharded ones
    optimizer = make_optimizer(trained_parameters(policy), config.train, accelerator.device)
    policy, optimizer = wrap(policy, optimizer, accelerator, config.train.max_grad_norm)
    trained = trained_parameters(policy)
    notes = [*describe_processes(accelerator), *describe_whole(policy, accelerator), *notes]
    reference, reference_notes = make_reference(config, policy, data.train, accelerator)
    teacher, teacher_notes = make_teacher(config, policy, accelerator)
    reference_notes += teacher_notes
    sync, sync_notes = make_sync(config, policy, reference, accelerator, total_steps)
    step = Step(
        accelerator,
        policy,
        config.loss,
        reference,
        micro_batch_tokens=config.train.first_micro_batch_tokens,
        max_length=config.data.max_length,
        pad_id=tokenizer.pad_token_id,
        teacher=teacher,
    )
    growth, growth_notes = make_growth(config.train.micro_batch_tokens, step.memory, accelerator)
    rollouts = None
    if config.rollout:
        rollouts = Rollouts(
            policy,
            tokenizer,
            config.rollout,
            rewards,
            config.loss.max_completion_length,
            state=TrainerState(max_steps=total_steps, steps_per_epoch=epoch_steps(data.epoch_size, config)),
            accelerator=accelerator,
            seed=config.train.seed,
            output_dir=config.train.output_dir,
            rollout_func=rollout_func,
        )
        notes.append(rollouts.at_most(min(config.train.batch_size or 1, data.epoch_size)))
        notes += describe_rollouts(config, taught=teacher is not None)
    models = policy, reference_model(reference), reference_model(teacher)
    frozen = fingerprint(*models)
    check_alike(accelerator, frozen)
    if config.train.overwrite_output_dir and accelerator.is_main_process:
        clear(Path(config.train.output_dir))
    scheduler = make_schedule(optimizer.optimizer, config.train, total_steps)
    return Run(
        config=config,
        accelerator=accelerator,
        tokenizer=tokenizer,
        policy=policy,
        step=step,
        data=data,
        rollouts=rollouts,
        trained=trained,
        optimizer=optimizer,
        scheduler=scheduler,
        total_steps=total_steps,
        notes=[*checkpoint_notes, *data.notes, *model_notes, *notes, *reference_notes, *sync_notes, *growth_notes],
        health=Health(config.loss, shapes[0].rows, config.train.max_grad_norm, config.train.output_dir),
        growth=growth,
        reference_sync=sync,
        checkpoint=checkpoint,
        frozen=frozen,
        configured=configured(*models),
    )


def load_functions(
    config: RunConfig, prompts: Sequence[Any], device: torch.device
) -> tuple[dict[str, Reward], Function | None]:
    """GRPO's rewards, and what makes completions, where that is a function of the user's. device: of reward models."""
    options = config.rollout
    if options is None:
        return {}, None
    own = None if options.rollout_func is None else load_function(options.rollout_func)
    kept: dict[str, Any] = {"device": device, "dtype": config.model.dtype}
    return load_rewards(options.reward_funcs, prompts[0].columns, more=own is not None, **kept), own


def describe_rollouts(config: RunConfig, *, taught: bool) -> list[str]:
    """What to tell of rollouts that will teach nothing, or something else than they seem to."""
    assert config.rollout is not None
    model, notes = config.model, []
    untrained = model.model_name_or_path == TINY and not model.adapter_name_or_path
    if untrained and not taught and set(config.rollout.reward_funcs) <= {"exact_answer", "accuracy_reward"}:
        notes.append(UNTRAINED)
    if config.rollout.max_staleness and getattr(config.loss, "sampling_correction", None) == "none":
        notes.append(UNCORRECTED)
    return notes


def start_accelerator(mixed_precision: str, timeout: int = 1800) -> Accelerator:
    """The Accelerator; UserError for a launcher's settings that are not supported, and where its processes would not
    find each other. timeout: how long they wait for each other, in seconds."""
    refuse_untried(mixed_precision)
    load_everywhere()
    # accelerate hands on what differs from its own default, which is not every backend's
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout, milliseconds=1))
    AcceleratorState._reset_state()  # else a process's first run decides the precision of all that follow
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision, gradient_accumulation_steps=1, kwargs_handlers=[waiting]
        )
    except ValueError as error:
        raise UserError(f"--mixed_precision {mixed_precision}: {error}") from error
    check_processes(accelerator)
    watch_over(accelerator, timeout)
    return accelerator


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
    return config.train.max_steps or max(1, round(epoch_steps(num_examples, config) * config.train.num_train_epochs))


def epoch_steps(num_examples: int, config: RunConfig) -> int:
    """Optimizer steps of a pass over so many examples."""
    return -(-num_examples // (config.train.batch_size or 1)) * (config.rollout.num_iterations if config.rollout else 1)


def batches(
    items: Sequence[Any], batch_size: int, *, shuffle: bool, seed: int, start: Mapping[str, int] | None = None
) -> Iterator[tuple[list[Any], Mapping[str, int]]]:
    """Steps of `batch_size` items for ever, each epoch in an order of its own; an epoch's last step may be smaller.

    Yields with each of them the position behind it, of which any may be the `start`. Items that have `batches` of their
    own are asked for them, those with an `order` for that.
    """
    if hasattr(items, "batches"):
        yield from items.batches(batch_size, shuffle=shuffle, seed=seed, start=start)
    epoch, offset = (start["epoch"], start["offset"]) if start else (0, 0)
    while True:
        if hasattr(items, "order"):
            order = items.order(epoch, shuffle=shuffle, seed=seed)
        else:
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
    if commit := config.model.model_revision:
        notes.append(f"{config.model.model_name_or_path} is the Hub's commit {commit}")
    model = add_adapters(model, config.model, frozen_copy=config.keeps_start)
    check_trainable(model)
    compared = config.wants_reference or config.anchored or config.rollout is not None
    notes += [*describe_adapters(model), *describe_dropout(model, compared=compared), *describe_stuck(model, config)]
    temperature = config.rollout.temperature if config.rollout else 1.0
    stats = (*config.loss.stats, *config.loss.metric_stats, *config.loss.ref_stats)
    policy = Policy(model, temperature=temperature, stats=stats)
    notes += share_prompts(policy, config.model.attn_implementation, autocast_of(config))
    policy.train()
    return policy, notes
