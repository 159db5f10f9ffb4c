"""Windows of rollouts: sampled, rewarded, packed and compared once, for the steps that learn from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice, pairwise

import torch
from accelerate import Accelerator
from torch import Tensor

from logratio.losses import KL_ESTIMATORS, Mean

from ..batches.packing import split_groups
from ..data.examples import Example, Prompt
from ..errors import UserError
from ..processes.dealing import shares
from ..step import MicroBatch, Step, Window
from .dynamic import Position, sample_differing
from .generation import numbered
from .rolled import Share
from .rollouts import Rollouts

Batches = Iterator[tuple[Sequence[Prompt], Position]]


def windows(
    rollouts: Rollouts,
    step: Step,
    batches: Batches,
    waiting: list[Window],
    *,
    batch_size: int,
    left: Callable[[], int],
) -> Iterator[Window]:
    """What each optimizer step learns from, for ever: sets of rollouts, each dealt to its steps in turn and gone over
    `num_iterations` times, as TRL does.

    batches: the prompts of a step, or with `dynamic_sampling` one each, and where the data go on behind them. waiting:
    windows of the last set that are still to come, which a checkpoint keeps. left: how many steps the run still has;
    none is sampled for another.
    """
    config = rollouts.config
    while True:
        if not waiting:
            steps = min(config.steps_per_generation, left())
            if config.dynamic_sampling > 1:
                each = ((prompt, position) for (prompt,), position in batches)
                found, position = sample_differing(rollouts, step.accelerator, each, [batch_size] * steps)
            else:
                ahead = list(islice(batches, steps))
                found, position = sample(rollouts, step.accelerator, [prompts for prompts, _ in ahead]), ahead[-1][1]
            made = compared(rollouts, step, found)
            for window in made:
                window.position = position
            waiting += made * config.num_iterations
        window = waiting.pop(0)
        yield window
        for other in {id(w): w for w in waiting if w is not window}.values():
            other.taken += 1


def roll_out(rollouts: Rollouts, step: Step, prompts: Sequence[Prompt]) -> Window:
    """What the process learns in one step from its share of these prompts."""
    return compared(rollouts, step, sample(rollouts, step.accelerator, [prompts]))[0]


def sample(rollouts: Rollouts, accelerator: Accelerator, batches: Sequence[Sequence[Prompt]]) -> Share:
    """The process's share of the rollouts of the steps that have these prompts, all sampled at once."""
    prompts = numbered([prompt for some in batches for prompt in some])
    own = shares([len(some) for some in batches], accelerator)
    places = [place for some in own for place in some]
    rolled = dataclasses.replace(rollouts([prompts[place] for place in places]), places=places)
    return Share(rolled, list(map(len, own)), {**rollouts.metrics(rolled, accelerator), **rollouts.timed})


def compared(rollouts: Rollouts, step: Step, sampled: Share) -> list[Window]:
    """What the process learns in each of the steps: rollouts with advantages among all of the set, and old log-probs
    where steps will differ from the policy that sampled them."""
    config, (rolled, counts, metrics) = rollouts.config, sampled
    later, penalized = len(counts) * config.num_iterations > 1, config.reward_kl_coef > 0

    def packed() -> list[tuple[list[Example], list[MicroBatch]]]:
        return [packed_step(step, own, old=later or penalized, ref=penalized) for own in dealt(rolled.examples, counts)]

    parts = step.memory.again(packed)
    examples, micros = ([one for some in each for one in some] for each in zip(*parts, strict=True))
    kl = None
    if penalized:
        kl, metrics["kl"] = reward_kl(examples, micros, config.reward_kl_estimator)
        kl = kl.view(rolled.by_function.shape[:2])
        if not later:  # on policy, as without the penalty
            for micro in micros:
                micro.old = None
    advantages = rollouts.advantages(rolled, step.accelerator, kl).flatten().tolist()
    give_advantages(examples, micros, advantages)
    rollouts.learned(micros)  # as far as it is known before the steps on them
    whole = dealt(give_advantages(rolled.examples, [], advantages), counts)
    return [Window(own, cut, metrics, dealt=True) for own, (_, cut) in zip(whole, parts, strict=True)]


def dealt(examples: Sequence[Example], counts: Sequence[int]) -> list[Sequence[Example]]:
    """The next so many of them for each step."""
    return [examples[start:end] for start, end in pairwise(accumulate(counts, initial=0))]


def packed_step(
    step: Step, examples: Sequence[Example], *, old: bool, ref: bool
) -> tuple[list[Example], list[MicroBatch]]:
    """A step's examples as they are packed, and its micro-batches with the log-probs of the policy that sampled them
    and of the reference, where these are asked for."""
    # whole groups are compared; ones that do not fit a micro-batch are divided
    parts = split_groups(examples, step.micro_batch_tokens, step.policy.shared)
    micros = step.micro_batches(parts, dealt=True)
    if old:
        step.memory.together(lambda: step.fill_old(micros))
    if ref:
        step.memory.together(lambda: step.fill_reference(micros))
    return parts, micros


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
