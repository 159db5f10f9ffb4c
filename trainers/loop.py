"""The training loop: windows of examples in, an adapter or a model and a log out.

A step is `batch_size` examples, however many micro-batches and processes they take. Read `step.py` for how one
step's gradient comes about, `setup.py` for where everything below comes from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from logratio.losses import Mean

from .checkpoint import save
from .config import RunConfig
from .data.examples import Example
from .data.packing import split_groups
from .errors import UserError
from .policy.load import describe
from .rollout.rollouts import Rolled, give_advantages, reward_kl
from .runlog import RunLog, peak_mem_mib
from .setup import Run, build, windows
from .step import StepResult, rows_of


def train(config: RunConfig) -> dict[str, float]:
    """Train, log, evaluate and save as `config` says; returns the last step's metrics, and the evaluation's.

    Raises UserError for bad input, and where a loss or a gradient is not finite (nothing is saved then).
    """
    return train_run(build(config))


def train_run(run: Run, *, until: Callable[[Run, int], bool] | None = None, quiet: bool = False) -> dict[str, float]:
    """The loop itself.

    until: called with the run and the step's number after every step; the step for which it is true, on all
        processes alike, is the last. quiet: nothing is shown, all is written.
    """
    config, total_steps = run.config, run.total_steps
    output_dir = Path(config.train.output_dir)
    main = run.accelerator.is_main_process
    with RunLog(config.train.output_dir, config.as_dict(), total_steps=total_steps, main=main, quiet=quiet) as log:
        for note in (describe(run.policy.model), *run.notes):
            log.say(note)
        log.list_skipped(run.data.skipped)
        row: dict[str, float] = {}
        step = num_tokens = 0
        started = time.perf_counter()
        for examples, gathered, micros, dealt in steps(run):
            step += 1
            totals = run.step.totals(examples, micros, dealt)
            try:
                result = run.step(micros, totals)
                grad_norm = update(run, examples)
            except UserError as error:
                raise UserError(f"step {step}: {error}") from error
            if run.reference_sync is not None:
                run.reference_sync.after(step)
            learning_rate = run.optimizer.param_groups[0]["lr"]
            run.scheduler.step()

            for name, mean in gathered.items():
                result.metrics[name] = Mean(*(x.to(run.accelerator.device) for x in mean))
            tokens = count_tokens(examples)
            result.metrics["tokens"] = Mean(*torch.tensor([tokens, 1.0], device=run.accelerator.device))
            metrics = result.reduced(run.accelerator)
            tokens = int(metrics.pop("tokens") * (run.accelerator.num_processes if dealt else 1))
            num_tokens += tokens
            step_ms = (time.perf_counter() - started) * 1e3
            row = {
                "step": step,
                "loss": metrics.pop("loss"),
                "grad_norm": grad_norm,
                "learning_rate": learning_rate,
                **metrics,
                "num_tokens": num_tokens,
                "tokens_per_s": tokens / step_ms * 1e3,
                "step_ms": step_ms,
                "peak_mem_mib": peak_mem_mib(run.accelerator.device),
            }
            if until is not None and until(run, step):
                total_steps = step
            due = due_at(step, config.train.eval_steps, total_steps)
            if due and run.data.evaluation:
                row |= {f"eval_{name}": value for name, value in evaluate(run).items()}
            log.step(row)
            if due_at(step, config.train.save_steps, total_steps) and main:
                save(run.policy, run.tokenizer, output_dir / ("" if step == total_steps else f"checkpoint-{step}"))
            if step == total_steps:
                break
            started = time.perf_counter()
        log.say(f"{step} steps done; saved in {output_dir}")
    return row


def steps(run: Run) -> Any:
    """Yields (examples, their metrics, micro-batches, dealt) for ever, one an optimizer step.

    dealt: the examples are this process's own (rollouts that it sampled), not the whole step's.
    """
    config = run.config.train
    assert config.batch_size is not None
    for window in windows(run.data.train, config.batch_size, shuffle=run.config.data.shuffle, seed=config.seed):
        if run.rollouts is None:
            yield window, {}, run.step.micro_batches(window), False
            continue
        rollout = run.config.rollout
        assert rollout is not None
        rolled = sample(run, window)
        # whole groups are compared; ones that do not fit a micro-batch are divided
        examples = split_groups(rolled.examples, config.micro_batch_tokens, run.policy.shared)
        micros = run.step.micro_batches(examples, dealt=True)
        kl, metrics = None, run.rollouts.metrics(rolled, run.accelerator)
        if rollout.num_iterations > 1 or rollout.reward_kl_coef:
            run.step.fill_old(micros)
        if rollout.reward_kl_coef:
            run.step.fill_reference(micros)
            kl, metrics["kl"] = reward_kl(examples, micros, rollout.reward_kl_estimator)
            kl = kl.view(rolled.by_function.shape[:2])
            if rollout.num_iterations == 1:  # on policy, as without the penalty
                for micro in micros:
                    micro.old = None
        advantages = run.rollouts.advantages(rolled, run.accelerator, kl)
        examples = give_advantages(examples, micros, advantages.flatten().tolist())
        for _ in range(rollout.num_iterations):
            yield examples, metrics, micros, True


def sample(run: Run, prompts: Sequence[Any]) -> Rolled:
    """This process's share of the prompts, rolled out and scored."""
    assert run.rollouts is not None
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    if len(prompts) < world:
        raise UserError(f"a step of {len(prompts)} prompts cannot be dealt to {world} processes; raise --batch_size")
    return run.rollouts(prompts[rank::world])


def update(run: Run, examples: Sequence[Example]) -> float:
    """Clip, step, reset; returns the gradient's norm before clipping. UserError where it is not finite."""
    trained = [p for p in run.policy.parameters() if p.requires_grad]
    limit = run.config.train.max_grad_norm or math.inf
    norm = run.accelerator.clip_grad_norm_(trained, limit)
    grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    # with a gradient scaler (float16) an overflow is expected now and then, and the step skipped
    if not math.isfinite(grad_norm) and run.accelerator.scaler is None:
        raise UserError(
            f"the gradient is not finite, though the loss is (rows {rows_of(examples)} of the data set); "
            "lower the learning rate or use float32"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    return grad_norm


def evaluate(run: Run) -> dict[str, float]:
    """Loss and metrics of the held-out examples, as if they were one step without an update."""
    if run.rollouts is not None:
        rank, world = run.accelerator.process_index, run.accelerator.num_processes
        rolled = run.rollouts(run.data.evaluation[rank::world], greedy=False)
        metrics = run.rollouts.metrics(rolled, run.accelerator)
        zero = torch.zeros((), device=run.accelerator.device)
        means = {name: Mean(*(x.to(zero.device) for x in mean)) for name, mean in metrics.items()}
        return {k: v for k, v in StepResult(zero, means).reduced(run.accelerator).items() if k != "loss"}
    micros = run.step.micro_batches(run.data.evaluation)
    was_training = run.policy.training
    run.policy.eval()
    result = run.step(micros, run.step.totals(run.data.evaluation, micros), backward=False)
    run.policy.train(was_training)
    return result.reduced(run.accelerator)


def count_tokens(examples: Sequence[Example]) -> int:
    """Tokens that the examples hold, a prompt counted with each of its completions, as an unshared pass would."""
    return sum(len(e.prompt_ids) + len(c.ids) for e in examples for c in e.completions)


def due_at(step: int, every: int | None, total: int) -> bool:
    return step == total or (every is not None and step % every == 0)
