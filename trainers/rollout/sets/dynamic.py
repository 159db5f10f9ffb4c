"""Dynamic sampling: groups whose rewards are all equal teach nothing, and others are sampled in their place (DAPO,
arXiv 2503.14476 Sec. 3.2).

A round samples as many of the next prompts as groups are missing, so that none that can teach is thrown away. verl,
whose `max_num_gen_batches` is our `dynamic_sampling`, samples whole batches, drops what is too much, and ends the run
where the rounds were not enough. TRL has nothing like it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from logratio.losses import Mean
from logratio.losses.advantages import AGGREGATIONS, differ

from ...data.examples import Prompt
from ...processes.dealing import gather_rows, shares
from ...window import Position
from ..generation import numbered
from ..metrics import time_metrics
from ..rollouts import Rollouts
from .rolled import Rolled, Share, joined


def sample_differing(
    rollouts: Rollouts, accelerator: Accelerator, source: Iterator[tuple[Prompt, Position]], sizes: Sequence[int]
) -> tuple[Share, Position]:
    """Groups with rewards that differ, for steps of so many: this process's share of them, with metrics of all that was
    sampled; and where the prompts go on.

    After the last round a step is filled up with groups of equal rewards, the first that there are.
    """
    config, wanted = rollouts.config, sum(sizes)
    prompts: list[Prompt] = []
    rounds: list[Rolled] = []
    seconds, tokens = 0.0, 0
    teaches: list[bool] = []
    while sum(teaches) < wanted and len(rounds) < config.dynamic_sampling:
        new = [next(source) for _ in range(wanted - sum(teaches))]
        position = new[-1][1]
        prompts = numbered([*prompts, *(prompt for prompt, _ in new)])
        places = range(len(teaches), len(prompts))[accelerator.process_index :: accelerator.num_processes]
        rolled = dataclasses.replace(rollouts([prompts[place] for place in places]), places=places)
        rounds.append(rolled)
        seconds, tokens = seconds + rollouts.timed[0], tokens + rollouts.timed[1]
        teaches += differing(rollouts, in_order(accelerator, rolled)).tolist()
    mine = joined(rounds)
    metrics = {**rollouts.metrics(mine, accelerator), **time_metrics(seconds, tokens)}
    equal = [place for place, taught in enumerate(teaches) if not taught]
    missing = wanted - sum(teaches)
    left_out = frozenset(equal[missing:])
    if missing:
        rollouts.watch.note(
            "dynamic",
            f"step {rollouts.state.global_step + 1}: after {config.dynamic_sampling} rounds (--dynamic_sampling) "
            f"{wanted - missing} of {wanted} groups had rewards that differ; it goes on with others beside them, which "
            "teach nothing: take prompts that are right now and then",
        )
    metrics["dynamic/rounds"] = Mean(torch.tensor(float(len(rounds))), torch.tensor(1.0))
    metrics["dynamic/filtered"] = Mean(torch.tensor(float(len(left_out))), torch.tensor(float(len(prompts))))
    unlearned = mine.take([i for i, place in enumerate(mine.places) if place in left_out])
    rollouts.keeper.keep(rollouts.state.global_step + 1, unlearned, None, accelerator)
    everyone = mine if accelerator.num_processes == 1 else joined(gather_object([mine]))
    at = {place: i for i, place in enumerate(everyone.places)}
    chosen = [at[place] for place in range(len(prompts)) if place not in left_out]
    own = shares(sizes, accelerator)
    dealt = everyone.take([chosen[i] for some in own for i in some])
    return Share(dealt, list(map(len, own)), metrics), position


def differing(rollouts: Rollouts, by_function: Tensor) -> Tensor:
    """[prompts], whether a group's rewards differ, so that it has advantages. by_function: [prompts, G, K]."""
    rewards = AGGREGATIONS[rollouts.config.multi_objective_aggregation](by_function, rollouts.weights)
    return differ(rewards)[:, 0]


def in_order(accelerator: Accelerator, rolled: Rolled) -> Tensor:
    """[prompts, G, K], the rewards of all processes in the order of the prompts."""
    everyone, _ = gather_rows(accelerator, rolled.by_function)
    places, _ = gather_rows(accelerator, torch.tensor(rolled.places, dtype=torch.long))
    return everyone[places.argsort()]
