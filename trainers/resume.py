"""A run's whole state into a checkpoint, and back: what the run does afterwards is the same to the bit.

On another number of processes too: the main process writes what all have, and each takes its share.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor

from logratio.losses import Mean, Support

from .batches.packing import split_groups
from .checkpoints.best import Best
from .checkpoints.checkpoint import (
    AHEAD,
    FORMAT,
    OPTIMIZER,
    RANDOM,
    REFERENCE,
    ROLLOUT_LOGPS,
    ROLLOUTS,
    STATE,
)
from .checkpoints.folder import keep_latest, name_of, write_whole
from .checkpoints.model import base_model, load_weights, write_model
from .checkpoints.tensors import flat, nested
from .data.examples import Completion, Example
from .ground.provenance import commit, versions
from .ground.randomness import as_json, from_json, random_states, set_random_states
from .policy.reference import by_completion, of_completions
from .processes.once import on_main
from .processes.optimizer_state import load_optimizer_state, optimizer_state
from .processes.sharding import full_weights
from .setup import Run
from .step import Window

SUPPORT = ("support_ids", "support_offsets")
LOGPS = ("old", "ref")  # of a micro-batch of rollouts, that later steps on them are compared with


@dataclass
class Progress:
    """Where a run is, besides what its objects know: steps done, position in the data behind them, tokens so far, the
    log's hash, the rollouts that the next step learns from too, and the best evaluation."""

    step: int = 0
    position: Mapping[str, int] | None = None
    num_tokens: int = 0
    log_hash: str = ""
    window: Window | None = None
    best: Best = field(default_factory=Best)
    saved: int | None = None  # step of the last checkpoint that is whole


def save_checkpoint(run: Run, progress: Progress, flush_log: Callable[[], str]) -> None:
    """Leave checkpoint-N in `output_dir` and remove those beyond `save_total_limit`; all processes call it.

    flush_log: lets all lines be on the disk, and returns the hash of the last. Raises UserError, on all processes,
    where the disk does not take it.
    """
    config, output_dir = run.config, Path(run.config.train.output_dir)
    randoms = gather_object([as_json(random_states(run.accelerator.device))])
    rollouts = None if progress.window is None else gather_object([unpacked(progress.window)])
    ahead = None if run.rollouts is None else run.rollouts.flights.landed()
    state = state_of(run, progress)
    weights = full_weights(run.policy, run.accelerator)
    optimizer = optimizer_state(run.policy, run.optimizer, run.accelerator)

    def fill(folder: Path) -> None:
        write_model(run.policy, run.tokenizer, folder, weights)
        moments, state["optimizer"] = flat(optimizer)
        save_file(moments, folder / OPTIMIZER)
        write_json(folder / RANDOM, randoms)
        if run.reference_sync is not None:
            tensors, state["reference_terms"] = run.reference_sync.state()
            save_file({name: t.contiguous() for name, t in tensors.items()}, folder / REFERENCE)
        if rollouts is not None:
            write_json(folder / ROLLOUTS, [share for share, _ in rollouts])
            save_file(
                {f"{i}/{k}": t for i, (_, kept) in enumerate(rollouts) for k, t in kept.items()}, folder / ROLLOUT_LOGPS
            )
        if ahead:
            (folder / AHEAD).write_text(json.dumps(ahead))
        write_json(folder / STATE, state)

    def write() -> None:
        state["log_hash"] = flush_log()
        with base_model(config, run.policy):
            write_whole(output_dir / name_of(progress.step), fill)
        keep_latest(output_dir, config.save.save_total_limit, also=best_step(run, progress))

    on_main(run.accelerator, write)
    progress.saved = progress.step


def best_step(run: Run, progress: Progress) -> int | None:
    """Of the checkpoint whose weights are saved in the end, as far as one knows; None: the last weights are."""
    return progress.best.step if run.config.save.load_best_model_at_end and progress.best.value is not None else None


def state_of(run: Run, progress: Progress) -> dict[str, Any]:
    """What `STATE` holds of the run."""
    scaler = run.accelerator.scaler
    return {
        "format": FORMAT,
        "step": progress.step,
        "position": progress.position,
        "num_tokens": progress.num_tokens,
        "best": dataclasses.asdict(progress.best),
        "loss_state": dict(run.step.state),
        "micro_batch_tokens": run.step.micro_batch_tokens,
        "may_grow": run.growth.meter is not None,
        "rollouts_taken": 0 if progress.window is None else progress.window.taken,
        "health": run.health.state_dict(),
        "rollouts": None if run.rollouts is None else run.rollouts.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "config": run.config.as_dict(),
        "about": about(run),
    }


def about(run: Run) -> dict[str, Any]:
    """By which code, on how many processes, on which device and on what the run trains."""
    return {
        **code(),
        "num_processes": run.accelerator.num_processes,
        **device_of(run.accelerator.device),
        "data": run.data.fingerprint,
        "frozen": run.frozen,
    }


def device_of(device: torch.device) -> dict[str, Any]:
    """Its name and its memory; of a CPU "cpu", and no memory of its own."""
    if device.type != "cuda":
        return {"device": device.type, "device_mem_mib": None}
    found = torch.cuda.get_device_properties(device)
    return {"device": found.name, "device_mem_mib": found.total_memory / 2**20}


@functools.cache
def code() -> dict[str, Any]:
    """That of this process, which asking for costs more than a small checkpoint."""
    return {"commit": commit(), "versions": versions()}


def restore(run: Run) -> Progress:
    """Give the run the state of the checkpoint that it was built to go on from; returns where it is then.

    Raises UserError where the data or the frozen weights are not those that the checkpoint was trained on.
    """
    checkpoint = run.checkpoint
    if checkpoint is None:
        return Progress()
    state, rank, device = checkpoint.state, run.accelerator.process_index, run.accelerator.device
    checkpoint.check_same(run.data.fingerprint, run.frozen)
    load_weights(run.config, run.policy, checkpoint.folder, run.accelerator)
    optimizer = nested(checkpoint.tensors(OPTIMIZER), state["optimizer"])
    load_optimizer_state(run.policy, run.optimizer, run.accelerator, optimizer)
    run.scheduler.load_state_dict(state["scheduler"])
    if state["scaler"] is not None and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step.state = state["loss_state"]
    if state["config"]["train"]["micro_batch_tokens"] == run.config.train.micro_batch_tokens:
        run.step.micro_batch_tokens = state["micro_batch_tokens"]  # fewer, where so many did not fit into memory
        if not state["may_grow"]:
            run.growth.meter = None
    if run.reference_sync is not None:
        run.reference_sync.load_state(checkpoint.tensors(REFERENCE), state["reference_terms"])
    run.health.load_state_dict(state["health"])
    if run.rollouts is not None:
        run.rollouts.load_state_dict(state["rollouts"])
        run.rollouts.after(checkpoint.step)
        run.rollouts.flights.restore(checkpoint.json(AHEAD) or [])
    progress = Progress(
        step=checkpoint.step,
        position=state["position"],
        num_tokens=state["num_tokens"],
        log_hash=state["log_hash"],
        best=Best(**state["best"]),
        saved=checkpoint.step,
    )
    if (shares := checkpoint.json(ROLLOUTS)) is not None:
        logps, taken = checkpoint.tensors(ROLLOUT_LOGPS), state["rollouts_taken"]
        progress.window = restored_window(run, shares, logps, state["position"], taken)
    randoms = checkpoint.json(RANDOM)
    if rank < len(randoms):  # others began with the seed, as processes that are there from the beginning do
        set_random_states(from_json(randoms[rank]), device)
    return progress


def unpacked(window: Window) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """This process's share of a window of rollouts, whatever its micro-batches: (examples and metrics as JSON, {"old",
    "ref": the log-probs of all scored tokens in the order of the examples; and their support})."""
    share = {
        "examples": [dataclasses.asdict(plain(example)) for example in window.examples],
        "metrics": {name: [float(total), float(count)] for name, (total, count) in window.metrics.items()},
    }
    kept = {}
    for name in LOGPS:
        table = by_completion((m.batch, getattr(m, name)) for m in window.micros if getattr(m, name) is not None)
        if table:
            kept[name] = torch.cat([table[id(c)] for example in window.examples for c in example.completions])
    completions = [c for example in window.examples for c in example.completions]
    if any(c.support is not None for c in completions):
        support = Support.cat([c.support or Support.whole(len(c.ids)) for c in completions])
        kept |= dict(zip(SUPPORT, support, strict=True))
    return share, kept


def plain(example: Example, supports: Iterator[Support] | None = None) -> Example:
    """The example without its completions' support, which is no JSON, or with the next ones of these."""
    completions = [
        dataclasses.replace(c, support=None if supports is None else next(supports)) for c in example.completions
    ]
    return dataclasses.replace(example, completions=completions)


def restored_window(run: Run, shares: Sequence[Any], logps: Mapping[str, Tensor], position: Any, taken: int) -> Window:
    """The inverse: on as many processes each its own share, on another number all of them dealt anew."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    examples = [[example_of(e) for e in share["examples"]] for share in shares]
    for i, own in enumerate(examples):
        if f"{i}/{SUPPORT[0]}" in logps:
            counts = [len(c.ids) for e in own for c in e.completions]
            supports = iter(Support(*(logps[f"{i}/{part}"] for part in SUPPORT)).split(counts))
            examples[i] = [plain(e, supports) for e in own]
    tables: dict[str, dict[int, Tensor]] = {name: {} for name in LOGPS}
    for (name, table), (i, own) in itertools.product(tables.items(), enumerate(examples)):
        if (values := logps.get(f"{i}/{name}")) is not None:
            completions = [c for e in own for c in e.completions]
            counts = [len(c.ids) if c.scored is None else sum(c.scored) for c in completions]
            table |= {id(c): own for c, own in zip(completions, values.split(counts), strict=True)}
    if len(shares) == world:
        mine, metrics = examples[rank], shares[rank]["metrics"]
    else:
        everyone = [e for own in examples for e in own]
        mine, metrics = everyone[rank::world], summed([share["metrics"] for share in shares[rank::world]], shares)
    parts = split_groups(mine, run.step.micro_batch_tokens, run.policy.shared)
    micros = run.step.micro_batches(parts, dealt=True)
    for micro, (name, table) in itertools.product(micros, tables.items()):
        if table:
            setattr(micro, name, of_completions(micro.batch, table))
    means = {name: Mean(*torch.tensor(mean, dtype=torch.float64)) for name, mean in metrics.items()}
    return Window(mine, micros, means, dealt=True, taken=taken, position=position)


def summed(some: Sequence[dict[str, list[float]]], shares: Sequence[Any]) -> dict[str, list[float]]:
    """The metrics of some shares together, 0 of 0 where none of them has one: every process has the same names."""
    names = sorted({name for share in shares for name in share["metrics"]})
    zero = [0.0, 0.0]
    return {name: [sum(m.get(name, zero)[i] for m in some) for i in (0, 1)] for name in names}


def example_of(entry: dict[str, Any]) -> Example:
    completions = [Completion(**completion) for completion in entry.pop("completions")]
    advantages = entry.pop("advantages")
    return Example(**entry, completions=completions, advantages=None if advantages is None else tuple(advantages))


def load_best(run: Run, progress: Progress) -> list[str]:
    """Give the policy the weights of the best checkpoint, where the options ask for it; returns what to tell."""
    step = best_step(run, progress)
    if step is None:
        return []
    folder = Path(run.config.train.output_dir) / name_of(step)
    best = f"{run.config.save.metric} {progress.best.value:.4g}"
    if not folder.is_dir():  # the disk did not take it, or the run began in another folder
        return [f"the best weights, of step {step} with {best}, are not in {folder}: saved are the last ones"]
    load_weights(run.config, run.policy, folder, run.accelerator)
    return [f"saved are the weights of step {step}, whose {best} is the best"]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
