"""A window of rollouts: sampled, rewarded, packed and compared once, for the steps that learn from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from logratio.losses import KL_ESTIMATORS, Mean

from ..batches.packing import split_groups
from ..data.examples import Example, Prompt
from ..errors import UserError
from ..processes.dealing import share
from ..step import MicroBatch, Step, Window
from .generation import numbered
from .rollouts import Rollouts


def roll_out(rollouts: Rollouts, step: Step, prompts: Sequence[Prompt]) -> Window:
    """What the process learns from its share of the prompts: rollouts with advantages, and old log-probs where later
    steps will differ from the policy that sampled them."""
    config, accelerator = rollouts.config, step.accelerator
    rolled = rollouts(share(numbered(prompts), accelerator))
    kl, metrics = None, {**rollouts.metrics(rolled, accelerator), **rollouts.timed}

    def packed() -> tuple[list[Example], list[MicroBatch]]:
        # whole groups are compared; ones that do not fit a micro-batch are divided
        parts = split_groups(rolled.examples, step.micro_batch_tokens, step.policy.shared)
        micros = step.micro_batches(parts, dealt=True)
        if config.num_iterations > 1 or config.reward_kl_coef:
            step.memory.together(lambda: step.fill_old(micros))
        if config.reward_kl_coef:
            step.memory.together(lambda: step.fill_reference(micros))
        return parts, micros

    examples, micros = step.memory.again(packed)
    if config.reward_kl_coef:
        kl, metrics["kl"] = reward_kl(examples, micros, config.reward_kl_estimator)
        kl = kl.view(rolled.by_function.shape[:2])
        if config.num_iterations == 1:  # on policy, as without the penalty
            for micro in micros:
                micro.old = None
    advantages = rollouts.advantages(rolled, accelerator, kl).flatten().tolist()
    give_advantages(examples, micros, advantages)
    rollouts.learned(micros)  # as far as it is known before the steps on it
    return Window(give_advantages(rolled.examples, [], advantages), micros, metrics, dealt=True)


def reward_kl(examples: Sequence[Example], micros: Sequence[MicroBatch], estimator: str) -> tuple[Tensor, Mean]:
    """The divergence of each completion from the reference, sum_t k(log old - log ref) over its scored tokens, [n]
    float64 in the order of the examples; and its mean over tokens.

    micros: these examples packed, with `old` and `ref` filled. Raises UserError where a divergence is not finite.
    """
    first, count = {}, 0
    for example in examples:
        first[id(example)] = count
        count += len(example.completions)
    sums = torch.zeros(count, dtype=torch.float64)
    tokens = torch.zeros(())
    for micro in micros:
        if micro.batch.is_filler:
            continue
        assert micro.old is not None and micro.ref is not None
        kl = torch.where(micro.batch.scored, KL_ESTIMATORS[estimator](micro.old.double() - micro.ref.double()), 0.0)
        tokens += micro.batch.scored.sum().cpu()
        at = 0
        for example in micro.batch.examples:
            start, n = first[id(example)], len(example.completions)
            sums[start : start + n] = kl[at : at + n].sum(-1).cpu()
            at += n
    for example in examples:
        if not sums[first[id(example)] :][: len(example.completions)].isfinite().all():
            raise UserError(
                f"the divergence from the reference is not finite (row {example.row} of the data set); "
                "take another --reward_kl_estimator, a smaller --learning_rate, or float32 where it is not"
            )
    return sums, Mean(sums.sum(), tokens)


def give_advantages(
    examples: Sequence[Example], micros: Sequence[MicroBatch], advantages: Sequence[float]
) -> list[Example]:
    """The examples with the advantages of their completions, given in the same order, in the micro-batches too."""
    values = iter(advantages)
    new = {
        id(example): dataclasses.replace(example, advantages=tuple(islice(values, len(example.completions))))
        for example in examples
    }
    for micro in micros:
        inside = tuple(new[id(example)] for example in micro.batch.examples)
        micro.batch = dataclasses.replace(micro.batch, examples=inside)
    return list(new.values())
