"""What the policy is worth on the held-out examples, in the middle of a run."""

from __future__ import annotations

import torch

from .data.examples import Example
from .rollout import evaluation
from .setup import Run
from .window import StepResult, on


def evaluate(run: Run, prefix: str = "eval") -> dict[str, float]:
    """Loss and metrics of the held-out examples, as if they were one step without an update: eval_loss and so on."""
    if run.rollouts is not None:
        device = run.accelerator.device
        sampled = evaluation.evaluate(run.rollouts, run.data.evaluation, run.accelerator)
        metrics = StepResult(torch.zeros((), device=device), on(device, sampled)).reduced(run.accelerator)
        del metrics["loss"]
    else:
        metrics = scored(run, list(run.data.evaluation)).reduced(run.accelerator)
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


def scored(run: Run, examples: list[Example]) -> StepResult:
    """Of all of them as one step."""

    def attempt() -> StepResult:
        micros = run.step.micro_batches(examples)
        return run.step(micros, run.step.totals(examples, micros), backward=False)

    was_training = run.policy.training
    run.policy.eval()
    result = run.step.memory.again(attempt)
    run.policy.train(was_training)
    return result
