"""The training loop: windows of examples in, an adapter or a model and a log out.

A step is `batch_size` examples, however many micro-batches and processes they take. Read `step.py` for how one
step's gradient comes about, `rollout/windows.py` for what GRPO learns from, `setup.py` for where all of it comes from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from logratio.losses import Mean

from .again import learn
from .checkpoint import save_run
from .config import RunConfig
from .data.examples import Example
from .errors import UserError
from .memory import no_room
from .policy.load import describe
from .rollout.generation import numbered
from .rollout.windows import roll_out
from .runlog import RunLog, peak_mem_mib
from .setup import Run, batches, build
from .step import StepResult, Window, rows_of


def train(config: RunConfig) -> dict[str, float]:
    """Train, log, evaluate and save as `config` says; returns the last step's metrics, and the evaluation's.

    Raises UserError for bad input, and where a loss or a gradient is not finite or a loss has exploded (nothing is
    saved then).
    """
    try:
        return train_run(build(config))
    except torch.OutOfMemoryError as error:
        raise no_room(error) from error


def train_run(run: Run, *, until: Callable[[Run, int], bool] | None = None, quiet: bool = False) -> dict[str, float]:
    """The loop itself.

    until: called with the run and the step's number after every step; the step for which it is true, on all
        processes alike, is the last. quiet: nothing is shown, all is written.
    """
    config, main, last = run.config.train, run.accelerator.is_main_process, run.total_steps
    row: dict[str, float] = {}
    num_tokens = 0
    with RunLog(config.output_dir, run.config.as_dict(), total_steps=last, main=main, quiet=quiet) as log:
        for note in (describe(run.policy.model), *run.notes):
            log.say(note)
        log.list_skipped(run.data.skipped)
        started = time.perf_counter()
        windows = Ahead(steps(run))
        for step, window in enumerate(windows, start=1):
            try:
                known = run.rollouts is None and step < last  # what is sampled needs the updated policy
                result = learn(run.step, window, meanwhile=windows.prepare if known else None)
                updated = update(run, window.examples, step)
            except UserError as error:
                raise UserError(f"step {step}: {error}") from error
            for note in (*(run.rollouts.after(step) if run.rollouts is not None else ()), *run.step.memory.take()):
                log.say(note)
            metrics, tokens = reduced(run, window, result)
            num_tokens += tokens
            step_ms = (time.perf_counter() - started) * 1e3
            row = {"step": step, "loss": metrics.pop("loss"), **updated, **metrics, "num_tokens": num_tokens}
            row |= {"tokens_per_s": tokens / step_ms * 1e3, "step_ms": step_ms}
            row["peak_mem_mib"] = peak_mem_mib(run.accelerator.device)

            if until is not None and until(run, step):
                last = step
            if run.data.evaluation and due_at(step, config.eval_steps, last):
                row |= {f"eval_{name}": value for name, value in evaluate(run).items()}
            log.step(row)
            for note in run.health.after(step, row, last=step == last):
                log.say(note)
            if main and due_at(step, config.save_steps, last):
                save_run(run.config, run.policy, run.tokenizer, None if step == last else step)
            if step == last:
                break
            started = time.perf_counter()
        log.say(f"{row['step']} steps done; saved in {config.output_dir}")
    return row


def steps(run: Run) -> Iterator[Window]:
    """What each optimizer step learns from, for ever: examples of the data set, or rollouts of its prompts."""
    config = run.config.train
    assert config.batch_size is not None
    for items in batches(run.data.train, config.batch_size, shuffle=run.config.data.shuffle, seed=config.seed):
        if run.rollouts is None:
            yield Window(items, run.step.micro_batches(items))
        else:
            window = roll_out(run.rollouts, run.step, items)
            for _ in range(run.rollouts.config.num_iterations):
                yield window


class Ahead(Iterator[Window]):
    """Windows in turn, of which the next one can be packed before it is asked for. What that raises is raised then."""

    def __init__(self, source: Iterator[Window]) -> None:
        self.source = source
        self.prepared: list[Window | Exception] = []

    def prepare(self) -> None:
        """Pack the next one."""
        try:
            self.prepared.append(next(self.source))
        except Exception as error:
            self.prepared.append(error)

    def __next__(self) -> Window:
        if not self.prepared:
            self.prepare()
        window = self.prepared.pop()
        if isinstance(window, Exception):
            raise window
        return window


def update(run: Run, examples: Sequence[Example], step: int) -> dict[str, float]:
    """Clip, update, reset; returns the gradient's norm before clipping and the learning rate. UserError where the
    norm is not finite."""
    limit = run.config.train.max_grad_norm or math.inf
    norm = run.accelerator.clip_grad_norm_(run.trained, limit)
    grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    # with a gradient scaler (float16) an overflow is expected now and then, and the step skipped
    if not math.isfinite(grad_norm) and run.accelerator.scaler is None:
        raise UserError(
            f"the gradient is not finite, though the loss is (rows {rows_of(examples)} of the data set); "
            "lower the learning rate or use float32"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.reference_sync is not None:
        run.reference_sync.after(step)
    learning_rate = run.optimizer.param_groups[0]["lr"]
    run.scheduler.step()
    return {"grad_norm": grad_norm, "learning_rate": learning_rate}


def reduced(run: Run, window: Window, result: StepResult) -> tuple[dict[str, float], int]:
    """Loss and metrics of the step over all processes, the window's own among them; and how many tokens it held."""
    world, device = run.accelerator.num_processes, run.accelerator.device
    counted = Mean(*torch.tensor([count_tokens(window.examples), 1.0]))
    result.metrics |= on(device, {**window.metrics, "tokens": counted})
    metrics = result.reduced(run.accelerator)
    return metrics, int(metrics.pop("tokens") * (world if window.dealt else 1))


def evaluate(run: Run) -> dict[str, float]:
    """Loss and metrics of the held-out examples, as if they were one step without an update."""
    if run.rollouts is not None:
        rank, world = run.accelerator.process_index, run.accelerator.num_processes
        rolled = run.rollouts(numbered(run.data.evaluation)[rank::world], "evaluation")
        zero = torch.zeros((), device=run.accelerator.device)
        result = StepResult(zero, on(zero.device, run.rollouts.metrics(rolled, run.accelerator)))
        return {name: value for name, value in result.reduced(run.accelerator).items() if name != "loss"}

    def attempt() -> StepResult:
        micros = run.step.micro_batches(run.data.evaluation)
        return run.step(micros, run.step.totals(run.data.evaluation, micros), backward=False)

    was_training = run.policy.training
    run.policy.eval()
    result = run.step.memory.again(attempt)
    run.policy.train(was_training)
    return result.reduced(run.accelerator)


def on(device: torch.device, metrics: Mapping[str, Mean]) -> dict[str, Mean]:
    return {name: Mean(*(x.to(device) for x in mean)) for name, mean in metrics.items()}


def count_tokens(examples: Sequence[Example]) -> int:
    """Tokens that the examples hold, a prompt counted with each of its completions, as an unshared pass would."""
    return sum(len(e.prompt_ids) + len(c.ids) for e in examples for c in e.completions)


def due_at(step: int, every: int | None, total: int) -> bool:
    return step == total or (every is not None and step % every == 0)
