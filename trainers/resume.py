"""A run's whole state into a checkpoint, and back: what the run does afterwards is the same to the bit.

On another number of processes too: the main process writes what all have, and each takes its share.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file

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
from .checkpoints.folder import checkpoints_in, keep_latest, name_of, write_whole
from .checkpoints.model import Weights, base_model, load_weights, save_run, write_model
from .checkpoints.tensors import flat, nested
from .errors import UserError, counted
from .ground.provenance import commit, versions
from .ground.randomness import as_json, from_json, random_states, set_random_states
from .logs.runlog import RunLog
from .processes.once import on_main
from .processes.optimizer_state import load_optimizer_state, optimizer_state
from .processes.sharding import full_weights
from .rollout.sets.stored import distinct, restored, turns, unpacked
from .setup import Run
from .window import Position, Window


@dataclass
class Progress:
    """Where a run is, besides what its objects know: steps done, position in the data behind them, tokens so far, the
    log's hash, the windows of rollouts that the next steps learn from in turn, and the best evaluation."""

    step: int = 0
    position: Position | None = None
    num_tokens: int = 0
    log_hash: str = ""
    windows: list[Window] = field(default_factory=list)
    best: Best = field(default_factory=Best)
    saved: int | None = None  # step of the last checkpoint that is whole


def save_checkpoint(run: Run, progress: Progress, flush_log: Callable[[], str]) -> None:
    """Leave checkpoint-N in `output_dir` and remove those beyond `save_total_limit`; all processes call it.

    flush_log: lets all lines be on the disk, and returns the hash of the last. Raises UserError, on all processes,
    where the disk does not take it.
    """
    config, output_dir = run.config, Path(run.config.train.output_dir)
    randoms = gather_object([as_json(random_states(run.accelerator.device))])
    once = distinct(progress.windows)
    rollouts = gather_object([[unpacked(window) for window in once]]) if once else None
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
            write_json(folder / ROLLOUTS, [[share for share, _ in own] for own in rollouts])
            logps = {f"{i}/{w}": kept for i, own in enumerate(rollouts) for w, (_, kept) in enumerate(own)}
            save_file({f"{at}/{k}": t for at, kept in logps.items() for k, t in kept.items()}, folder / ROLLOUT_LOGPS)
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
        "windows": turns(progress.windows),
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
        "configured": run.configured,
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

    Raises UserError where the data, the frozen weights or the models' configurations are not those that the
    checkpoint was trained on.
    """
    checkpoint = run.checkpoint
    if checkpoint is None:
        return Progress()
    state, rank, device = checkpoint.state, run.accelerator.process_index, run.accelerator.device
    checkpoint.check_same(data=run.data.fingerprint, frozen=run.frozen, configured=run.configured)
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
        once = restored(run.step, shares, checkpoint.tensors(ROLLOUT_LOGPS), state["position"])
        progress.windows += [once[w] for w in state["windows"]]
    randoms = checkpoint.json(RANDOM)
    if rank < len(randoms):  # others began with the seed, as processes that are there from the beginning do
        set_random_states(from_json(randoms[rank]), device)
    return progress


def compared(run: Run, progress: Progress, row: dict[str, float], log: RunLog) -> bool:
    """Compare an evaluation with those before, where the options ask for it; returns whether training ends with it."""
    options = run.config.save
    if not options.compares:
        return False
    try:
        progress.best.look(options, progress.step, row)
    except UserError as error:  # only now is it known which metrics there are
        log.step(row)
        save_checkpoint(run, progress, log.flush)
        raise UserError(
            f"{error}; give one of these with --resume_from_checkpoint latest, which goes on behind step "
            f"{progress.step}"
        ) from error
    if not progress.best.ends(options):
        return False
    without = f"{counted(progress.best.since, 'evaluation')} without a better {options.metric}"
    log.note(f"step {progress.step}: {without}: training ends")
    return True


def kept_behind(run: Run, progress: Progress, log: RunLog) -> str:
    """Leave a checkpoint of the last step where what the next learns from has failed (a reward raises, a server has
    gone, a streamed row cannot be used), which has changed nothing of it; what to tell. Of one process alone: another
    may not have failed."""
    step, ahead = progress.step, run.rollouts is not None and run.rollouts.config.max_staleness
    if ahead or run.accelerator.num_processes > 1 or not step:
        return ""
    if progress.saved != step:
        try:
            save_checkpoint(run, progress, log.flush)
        except UserError:  # what has failed before is the user's to see
            return ""
    return f"; step {step} is kept: the same command with --resume_from_checkpoint latest goes on from it"


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


def save_in_the_end(run: Run, weights: Weights) -> None:
    """The trained model into `output_dir`. UserError where the disk does not take it, with how to have it all the
    same."""
    try:
        save_run(run.config, run.policy, run.tokenizer, weights)
    except UserError as error:
        last = next((path.name for _, path in checkpoints_in(Path(run.config.train.output_dir))), None)
        on = f"the same command with --resume_from_checkpoint latest goes on from {last}" if last else "train again"
        raise UserError(f"{error}; make room, and {on}") from error


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
