"""Windows of rollouts: sampled, rewarded, packed and compared once, for the steps that learn from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice, pairwise

import torch
from accelerate import Accelerator
from torch import Tensor

from logratio.losses import KL_ESTIMATORS, Mean

from ...batches.packing import split_groups
from ...config import RolloutConfig
from ...data.examples import Example, Prompt
from ...errors import UserError
from ...policy.teacher import log_ratios
from ...step import Step
from ...window import MicroBatch, Position, Window
from ..engines.protocol import Said
from ..metrics import time_metrics
from ..rollouts import Rollouts
from .dynamic import sample_differing
from .flights import Coming
from .rolled import Rolled, Share
from .stored import distinct

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
    config, flights, accelerator = rollouts.config, rollouts.flights, step.accelerator
    first, total = rollouts.state.global_step + len(waiting), rollouts.state.global_step + left()
    flights.over(sets(config, batches, accelerator, total - first), accelerator, first=first, total=total)
    while True:
        if config.dynamic_sampling == 1:
            flights.before(rollouts.state.global_step)
        if not waiting:
            if config.dynamic_sampling > 1:
                each = ((prompt, position) for (prompt,), position in batches)
                sizes = [batch_size] * min(config.steps_per_generation, left())
                found, position = sample_differing(rollouts, accelerator, each, sizes)
            else:
                coming, said, timed = flights.land()
                found, position = sampled(rollouts, accelerator, coming, said, timed), coming.position
            made = compared(rollouts, step, found)
            for window in made:
                window.position = position
            waiting += made * config.num_iterations
        window = waiting.pop(0)
        for other in distinct(waiting):
            if other is not window:
                other.taken += 1  # when their turn comes; the checkpoint behind this step has to have it, too
        yield window


def sets(config: RolloutConfig, batches: Batches, accelerator: Accelerator, left: int) -> Iterator[Coming]:
    """What is sampled at once. left: how many steps the run still has, that are to learn from them."""
    while ahead := list(islice(batches, max(1, min(config.steps_per_generation, left)))):
        coming = Coming.of([prompts for prompts, _ in ahead], accelerator, config.num_iterations, ahead[-1][1])
        left -= coming.steps
        yield coming


def roll_out(rollouts: Rollouts, step: Step, prompts: Sequence[Prompt]) -> Window:
    """What the process learns in one step from its share of these prompts."""
    coming = Coming.of([prompts], step.accelerator)
    return compared(rollouts, step, sampled(rollouts, step.accelerator, coming))[0]


def sampled(
    rollouts: Rollouts,
    accelerator: Accelerator,
    coming: Coming,
    said: Said | None = None,
    timed: dict[str, Mean] | None = None,
) -> Share:
    """The process's share of a set of rollouts. said, timed: what was sampled of it already, and metrics of that."""
    rolled = dataclasses.replace(rollouts(coming.prompts, said=said), places=coming.places)
    metrics = {**rollouts.metrics(rolled, accelerator), **(time_metrics(*rollouts.timed) if timed is None else timed)}
    return Share(rolled, coming.counts, metrics)


def compared(rollouts: Rollouts, step: Step, found: Share) -> list[Window]:
    """What the process learns in each of the steps: rollouts with advantages among all of the set, and old log-probs
    where steps will differ from the policy of now, which is what a ratio is clipped to, whichever has sampled them."""
    config, (rolled, counts, metrics) = rollouts.config, found
    later, penalized = len(counts) * config.num_iterations > 1, config.reward_kl_coef > 0
    old = later or penalized or step.teacher is not None

    def packed() -> list[tuple[list[Example], list[MicroBatch], list[Tensor]]]:
        return [packed_step(step, own, old=old, ref=penalized) for own in dealt(rolled.examples, counts)]

    parts = step.memory.again(packed)
    examples, micros, taught = ([one for some in each for one in some] for each in zip(*parts, strict=True))
    kl = log_ratio = None
    if penalized:
        kl, metrics["kl"] = reward_kl(examples, micros, config.reward_kl_estimator)
        kl = kl.view(rolled.by_function.shape[:2])
    if step.teacher is not None:
        batches = ((micro.batch, ratio) for micro, ratio in zip(micros, taught, strict=True))
        log_ratio, metrics["teacher_kl"] = log_ratios(examples, batches)
        log_ratio = log_ratio.view(*rolled.by_function.shape[:2], -1)
    if old and not later:  # on policy: it was computed for the advantages alone
        for micro in micros:
            micro.old = None
    advantages = of_examples(rollouts.advantages(rolled, step.accelerator, kl, log_ratio), rolled)
    give_advantages(examples, micros, advantages)
    rollouts.keeper.learned(micros)  # as far as it is known before the steps on them
    whole = dealt(give_advantages(rolled.examples, [], advantages), counts)
    return [Window(own, cut, metrics, dealt=True) for own, (_, cut, _) in zip(whole, parts, strict=True)]


def dealt(examples: Sequence[Example], counts: Sequence[int]) -> list[Sequence[Example]]:
    """The next so many of them for each step."""
    return [examples[start:end] for start, end in pairwise(accumulate(counts, initial=0))]


def packed_step(
    step: Step, examples: Sequence[Example], *, old: bool, ref: bool
) -> tuple[list[Example], list[MicroBatch], list[Tensor]]:
    """A step's examples as they are packed; its micro-batches with the log-probs of the policy of now and of the
    reference, where these are asked for; and, where there is a teacher, its log-probs less the policy's."""
    # whole groups are compared; ones that do not fit a micro-batch are divided
    parts = split_groups(examples, step.micro_batch_tokens, step.policy.shared)
    micros = step.micro_batches(parts, dealt=True)
    if old:
        step.memory.together(lambda: step.fill_old(micros))
    if ref:
        step.memory.together(lambda: step.fill_reference(micros))
    return parts, micros, step.memory.together(lambda: teach(step, micros)) if step.teacher is not None else []


def teach(step: Step, micros: Sequence[MicroBatch]) -> list[Tensor]:
    """log p_T - log p_old of each micro-batch, [paths, T] float32."""
    found = []
    for micro in micros:
        assert step.teacher is not None and micro.old is not None
        with step.memory.fitting(micro.batch):
            found.append(step.teacher(micro.batch) - micro.old)
    return found


def reward_kl(examples: Sequence[Example], micros: Sequence[MicroBatch], estimator: str) -> tuple[Tensor, Mean]:
    """The divergence of each completion from the reference, sum_t k(log old - log ref) over its scored tokens, [n]
    float64 in the order of the examples; and its mean over tokens.

    micros: these examples packed, with `old` and `ref` filled. Raises UserError where a divergence is not finite.
    """
    found: dict[int, Tensor] = {}
    tokens = torch.zeros(())
    for micro in micros:
        if micro.batch.is_filler:
            continue
        assert micro.old is not None and micro.ref is not None
        kl = torch.where(micro.batch.scored, KL_ESTIMATORS[estimator](micro.old.double() - micro.ref.double()), 0.0)
        tokens += micro.batch.scored.sum().cpu()
        found |= {id(c): one for c, one in zip(micro.batch.completions, kl.sum(-1).cpu(), strict=True)}
    each = [(example.row, found[id(c)]) for example in examples for c in example.completions]
    for row, one in each:
        if not one.isfinite():
            raise UserError(
                f"the divergence from the reference is not finite (row {row} of the data set); "
                "take another --reward_kl_estimator, a smaller --learning_rate, or float32 where it is not"
            )
    sums = torch.stack([one for _, one in each]) if each else torch.zeros(0, dtype=torch.float64)
    return sums, Mean(sums.sum(), tokens)


def of_examples(advantages: Tensor, rolled: Rolled) -> list[float | tuple[float, ...]]:
    """One a completion, in the order of the examples; of advantages of tokens [prompts, G, T] those of the tokens that
    the policy has written, which are those that are scored, or all of them are not."""
    if advantages.ndim == 2:
        each: list[float | tuple[float, ...]] = advantages.flatten().tolist()
        return each
    scored = [c.num_scored for example in rolled.examples for c in example.completions]
    return [tuple(row[:n].tolist()) for row, n in zip(advantages.flatten(0, 1), scored, strict=True)]


def give_advantages(
    examples: Sequence[Example], micros: Sequence[MicroBatch], advantages: Sequence[float | tuple[float, ...]]
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
