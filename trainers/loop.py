"""The training loop: windows of examples in, an adapter or a model and a log out.

A step is `batch_size` examples, however many micro-batches and processes they take. Read `step.py`, which begins with
`learn`, for how one step's gradient comes about, `rollout/sets/windows.py` for what GRPO learns from, `setup.py` for
where all of it comes from.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from logratio.losses import Mean

from .batches.packing import example_tokens
from .checkpoints.folder import checkpoints_in
from .checkpoints.hub import push_run
from .checkpoints.output_dir import locked
from .config import RunConfig
from .config.numbers import number_of
from .data.examples import Example
from .data.sample import sample
from .errors import Stopped, UserError, counted
from .evaluating import evaluate
from .ground.alone import alone
from .ground.signals import Stop, stopping
from .logs.runlog import RunLog, peak_mem_mib
from .logs.trackers import chosen
from .memory import no_room
from .policy.load import describe
from .processes.dealing import any_process, largest
from .processes.sharding import full_weights
from .processes.watching import ending_together
from .resume import (
    Progress,
    about,
    best_step,
    compared,
    kept_behind,
    load_best,
    restore,
    save_checkpoint,
    save_in_the_end,
)
from .rollout.sets.windows import windows
from .setup import Run, batches, build
from .step import learn, rows_of
from .window import StepResult, Window, on

Planner = Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]
"""Of a run's settings (run_config.json) and data card: the peak of memory that is predicted, in MiB, where one is."""


def train(config: RunConfig, plan: Planner | None = None) -> dict[str, float]:
    """Train, log, evaluate and save as `config` says; returns the last step's metrics, and the evaluation's.

    plan: what the memory on the screen is compared with. Raises UserError for bad input, and where a loss or a gradient
    is not finite or a loss has exploded (nothing is saved then); Stopped where a signal ended it (a checkpoint is).
    """
    main = os.environ.get("RANK", "0") == "0"
    with ending_together(), locked(config.train.output_dir, main=main):
        try:
            run = build(config)  # until there is something to save, a signal ends it as any program
            with stopping() as stop:
                return train_run(run, stop=stop, plan=plan)
        except torch.OutOfMemoryError as error:
            raise no_room(error) from error


@alone()
def train_run(
    run: Run,
    *,
    until: Callable[[Run, Mapping[str, float]], bool] | None = None,
    told: Callable[[dict[str, float], Progress], None] | None = None,
    quiet: bool = False,
    stop: Stop | None = None,
    plan: Planner | None = None,
) -> dict[str, float]:
    """The loop itself, from the beginning or from where the run's checkpoint was left.

    until: called with the run and the step's line of the log after every step, before an evaluation; the step for which
        it is true, on all processes alike, is the last. told: called with every step's line, behind its checkpoint.
        quiet: nothing is shown, all is written. stop: knows whether a signal came. plan: see `train`.
    """
    progress, total = restore(run), run.total_steps
    with contextlib.closing(run), open_log(run, progress, plan, quiet) as log:
        log.say(describe(run.policy.model))
        for note in run.notes:
            log.note(note)
        log.list_skipped(run.data.skipped)
        log.keep_card(run.data.card())
        if run.config.train.eval_on_start and not progress.step:
            log.step(beginning := {"step": 0, **evaluate(run), "num_tokens": 0, "epoch": 0.0})
            if told is not None:
                told(beginning, progress)
        row, windows = log.last, Ahead(steps(run, progress))
        for step in range(progress.step + 1, total + 1):
            log.at = step
            try:
                row, asked = take(run, windows, progress, stop)
            except UserError as error:
                kept = kept_behind(run, progress, log) if windows.failed else ""
                raise UserError(f"step {step}: {error}{kept}") from error
            for note in (*(run.rollouts.after(step) if run.rollouts is not None else ()), *run.step.memory.take()):
                log.alarm(note)
            ends = (until is not None and any_process(run.accelerator, until(run, row))) or step == total
            if (rollouts := run.rollouts) is not None:
                log.completions(rollouts.keeper.taken(), number_of(rollouts.config.log_completions_steps, total) or 0)
            if run.data.evaluation and due_at(step, number_of(run.config.train.eval_steps, total), ends):
                row |= evaluate(run)
                ends |= compared(run, progress, row, log)
            log.sample(functools.partial(windows.sample, run.tokenizer, step))
            log.step(row)
            for note in run.health.after(step, row, last=ends):
                log.alarm(note)
            leave_checkpoint(run, progress, log, ends=ends, asked=asked)
            if told is not None:
                told(row, progress)
            if ends:
                break
        finish(run, progress, log)
    return row


def open_log(run: Run, progress: Progress, plan: Planner | None, quiet: bool) -> RunLog:
    """The run's log, from its beginning or behind the checkpoint's line."""
    settings, main = {**run.config.as_dict(), "about": about(run)}, run.accelerator.is_main_process
    return RunLog(
        run.config.train.output_dir,
        settings,
        total_steps=run.total_steps,
        main=main,
        quiet=quiet,
        after=(progress.step, progress.log_hash) if run.checkpoint else None,
        began=run.checkpoint.folder.parent if run.checkpoint else None,
        report_to=chosen(run.config.train.report_to),
        planned=plan(settings, run.data.card()) if main and plan else None,
    )


def finish(run: Run, progress: Progress, log: RunLog) -> None:
    """Save what was trained, and publish it where that is asked for."""
    main, folder = run.accelerator.is_main_process, run.config.train.output_dir
    for note in (*load_best(run, progress), *run.data.at_the_end()):
        log.note(note)
    log.keep_card(run.data.card())  # of streamed rows more is known now
    weights = full_weights(run.policy, run.accelerator)
    if main:
        save_in_the_end(run, weights)
    log.flush()  # or the lines that still wait are lost without a word
    log.say(f"{counted(progress.step, 'step')} done; saved in {folder}")
    if main and (told_of_push := push_run(run.config.save, Path(folder))):
        log.note(told_of_push)


def take(run: Run, windows: Ahead, progress: Progress, stop: Stop | None) -> tuple[dict[str, float], bool]:
    """One optimizer step: its line of the log, and whether a process was asked to stop."""
    started, step = time.perf_counter(), progress.step + 1
    window = next(windows)
    run.growth.before()
    known = run.rollouts is None and step < run.total_steps  # what is sampled needs the updated policy
    result = learn(run.step, window, meanwhile=windows.prepare if known else None)
    updated = update(run, window.examples, step)
    run.growth.after(window.micros)
    if run.rollouts is not None:
        run.rollouts.keeper.learned(window.micros)
    metrics, tokens, asked = reduced(run, window, result, asked=stop is not None and stop.received is not None)
    progress.step, progress.position = step, window.position
    progress.num_tokens += tokens
    row = {"step": step, "loss": metrics.pop("loss"), **updated, **metrics, "num_tokens": progress.num_tokens}
    row["epoch"] = step / run.steps_per_epoch
    seconds = time.perf_counter() - started
    row |= {"tokens_per_s": tokens / seconds, "step_ms": seconds * 1e3}
    row["peak_mem_mib"] = largest(run.accelerator, peak_mem_mib(run.accelerator.device))
    return row, asked


def leave_checkpoint(run: Run, progress: Progress, log: RunLog, *, ends: bool, asked: bool) -> None:
    """Where one is due. A disk that does not take it ends no run. Raises Stopped behind one that a signal asked for."""
    options, step = run.config.save, progress.step
    stops = asked and not ends
    due = options.save_steps is not None and due_at(step, number_of(options.save_steps, run.total_steps), ends)
    if not (due or stops or best_step(run, progress) == step):
        return
    try:
        save_checkpoint(run, progress, log.flush)
    except UserError as error:
        if stops:
            raise
        last = next((path.name for _, path in checkpoints_in(Path(run.config.train.output_dir))), None)
        kept = f"{last} is the last" if last else "there is none yet"
        log.alarm(f"step {step}: {error}; the run goes on, {kept}")
    if stops:
        raise Stopped(
            f"stopped after step {step}, saved in {run.config.train.output_dir}/checkpoint-{step}; the same command "
            "with --resume_from_checkpoint latest goes on"
        )


def steps(run: Run, progress: Progress) -> Iterator[Window]:
    """What each optimizer step learns from, for ever: examples of the data set, or rollouts of its prompts."""
    config = run.config.train
    assert config.batch_size is not None
    singly = run.rollouts is not None and run.rollouts.config.dynamic_sampling > 1
    size, shuffle = 1 if singly else config.batch_size, run.config.data.shuffle
    source = batches(run.data.train, size, shuffle=shuffle, seed=config.seed, start=progress.position)
    if run.rollouts is not None:
        left = lambda: run.total_steps - progress.step  # noqa: E731
        yield from windows(run.rollouts, run.step, source, progress.windows, batch_size=config.batch_size, left=left)
        return
    for items, position in source:
        yield Window(items, run.step.micro_batches(items), position=position)


class Ahead(Iterator[Window]):
    """Windows in turn, of which the next one can be packed before it is asked for. What that raises is raised then."""

    def __init__(self, source: Iterator[Window]) -> None:
        self.source = source
        self.prepared: list[Window | Exception] = []
        self.failed = False
        self.examples: Sequence[Example] = ()  # of the last one that was asked for

    def sample(self, tokenizer: Any, turn: int) -> list[tuple[str, str]]:
        """One of its examples as text, which take turns; nothing where this process had none."""
        return sample(self.examples[turn % len(self.examples)], tokenizer, turn) if self.examples else []

    def prepare(self) -> None:
        """Pack the next one, unless it is."""
        if self.prepared:
            return
        try:
            self.prepared.append(next(self.source))
        except Exception as error:
            self.prepared.append(error)

    def __next__(self) -> Window:
        self.prepare()
        window = self.prepared.pop()
        if isinstance(window, Exception):
            self.failed = True
            raise window
        self.examples = window.examples
        return window


def update(run: Run, examples: Sequence[Example], step: int) -> dict[str, float]:
    """Clip, update, reset; returns the gradient's norm before clipping and the learning rate. UserError where the
    norm is not finite."""
    limit = run.config.train.max_grad_norm or math.inf
    norm = run.accelerator.clip_grad_norm_(run.trained, limit)
    grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    # with a gradient scaler (float16) an overflow is expected now and then, and the step skipped
    if not math.isfinite(grad_norm) and run.accelerator.scaler is None:
        halves = run.config.model.dtype != "float32" or run.accelerator.mixed_precision != "no"
        raise UserError(
            f"the gradient is not finite, though the loss is (rows {rows_of(examples)} of the data set); lower the "
            f"learning rate{' or use float32' if halves else ''}"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.reference_sync is not None:
        run.reference_sync.after(step)
    learning_rate = run.optimizer.param_groups[0]["lr"]
    run.scheduler.step()
    return {"grad_norm": grad_norm, "learning_rate": learning_rate}


def reduced(run: Run, window: Window, result: StepResult, *, asked: bool) -> tuple[dict[str, float], int, bool]:
    """Of all processes in one sum: loss and metrics of the step, the window's own among them; how many tokens it held;
    and whether one was asked to stop."""
    told = {"tokens": count_tokens(window.examples), "asked": asked}
    means = {name: Mean(*torch.tensor([value, 1], dtype=torch.float64)) for name, value in told.items()}
    result.metrics |= on(run.accelerator.device, {**window.metrics, **means})
    metrics = result.reduced(run.accelerator)
    tokens = metrics.pop("tokens") * (run.accelerator.num_processes if window.dealt else 1)
    return metrics, int(tokens), metrics.pop("asked") > 0


def count_tokens(examples: Sequence[Example]) -> int:
    """Tokens that the examples hold, a prompt counted with each of its completions, as an unshared pass would."""
    return sum(example_tokens(e, shared=False) for e in examples)


def due_at(step: int, every: int | None, ends: bool) -> bool:
    return ends or (every is not None and step % every == 0)
