"""What a policy is worth on held-out pairs, row by row, so that contestants can be compared row by row.

| metric | of one row | better |
|---|---|---|
| reward | mean over `samples` completions, drawn at temperature 1, of the weighted sum of the rewards | higher |
| greedy | the same of the greedy completion | higher |
| exact | share of the sampled completions that are the row's `answer` | higher |
| accuracy | 1 where log pi/pi_start is higher for chosen than for rejected, 1/2 where equal (the start) | higher |
| nll | -log pi(chosen) by token, nats | lower |
| kl | mean over the sampled completions of log pi/pi_start, nats a completion: unbiased for KL(pi, pi_start) | |
| length | mean tokens of the sampled completions | |

The first two need rewards, the third a column `answer`. All contestants, at all times, draw with the same random
numbers, which depend on row and completion alone: what differs is the policy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from logratio.losses import Kind
from logratio.trainers.batches.packing import PackedBatch, pack
from logratio.trainers.config import RolloutConfig
from logratio.trainers.data.examples import Example, prepare, prepare_prompts
from logratio.trainers.data.rows import Rows
from logratio.trainers.errors import UserError
from logratio.trainers.policy.adapters import add_adapters
from logratio.trainers.policy.load import load_model
from logratio.trainers.policy.policy import Policy
from logratio.trainers.policy.reference import AdapterReference, ModelReference, Reference, inference
from logratio.trainers.rollout.generation import numbered, requests_of
from logratio.trainers.rollout.rewards import load_rewards
from logratio.trainers.rollout.rollouts import Rollouts
from logratio.trainers.setup import Run

from .rows import Row, as_kind


class Metric(NamedTuple):
    """better: 1 where higher is, -1 where lower is, 0 where neither is. short: on a terminal. words, note: what it is
    called elsewhere, and of what it is."""

    better: int
    short: str
    words: str
    note: str


METRICS = {
    "reward": Metric(1, "reward", "reward", "of sampled completions"),
    "greedy": Metric(1, "greedy", "reward, greedy", "of the greedy completion"),
    "exact": Metric(1, "exact", "exact", "share of sampled completions that are the answer"),
    "accuracy": Metric(1, "order", "pairs in order", "share of held-out pairs whose chosen has gained more"),
    "nll": Metric(-1, "NLL", "NLL of chosen", "nats a token"),
    "kl": Metric(0, "KL", "KL", "from the start, nats a completion"),
    "length": Metric(0, "long", "length", "tokens a completion"),
}
EXACT = "exact_answer"
SEED = 20261127
"""Of the evaluation's random numbers."""

Scores = dict[str, list[float]]
"""metric -> its value for each held-out row."""


@dataclass(frozen=True)
class Asked:
    """rewards: their names as `--reward_funcs` takes them; none: neither reward nor greedy. samples: completions of a
    row. longest: of a completion, in tokens."""

    rewards: tuple[str, ...]
    samples: int
    longest: int


class Scorer:
    """Scores a run's policy against what it started from, at any moment of its training."""

    def __init__(self, run: Run, rows: Sequence[Row], asked: Asked) -> None:
        data = run.config.data
        self.run, self.asked = run, asked
        self.policy = Policy(run.policy.model, shared=run.policy.shared)
        self.start = start_of(run, self.policy)
        pairs = Rows("held-out rows", as_kind(rows, Kind.PAIRED))
        self.pairs = prepare(pairs, Kind.PAIRED, run.tokenizer, max_length=data.max_length)[0]
        self.prompts = prepare_prompts(Rows("held-out rows", as_kind(rows, Kind.GROUPED)), run.tokenizer)[0]
        if len(self.pairs) != len(rows) or len(self.prompts) != len(rows):
            raise UserError(
                f"{len(rows) - len(self.pairs)} of {len(rows)} held-out rows have nothing scored within --max_length "
                f"{data.max_length}; make it larger"
            )
        with_answer = "answer" in rows[0] and EXACT not in asked.rewards
        names = (*asked.rewards, *([EXACT] if with_answer else []))
        rewards = load_rewards(names, self.prompts[0].columns, device=run.accelerator.device) if names else {}
        self.exact = list(rewards).index(EXACT) if EXACT in rewards else None
        config = RolloutConfig(
            num_generations=max(asked.samples, 2), reward_funcs=names or (EXACT,), log_completions=False
        )
        self.rollouts = Rollouts(self.policy, run.tokenizer, config, rewards, asked.longest, seed=SEED)
        self.before = self.of_pairs(self.start)

    def __call__(self) -> Scores:
        """All metrics of the policy as it is."""
        with inference(self.policy):
            return {**self.sampled(), **self.preferred()}

    def preferred(self) -> Scores:
        """Of the pairs."""
        now = self.of_pairs(lambda batch: self.policy(batch).logps)
        margins = [(w - w0) - (r - r0) for (w, r, _), (w0, r0, _) in zip(now, self.before, strict=True)]
        return {
            "accuracy": [0.5 if margin == 0 else float(margin > 0) for margin in margins],
            "nll": [-w / tokens for w, _, tokens in now],
        }

    def sampled(self) -> Scores:
        """Of what the policy says itself."""
        group = self.asked.samples
        # the same random numbers, whatever the policy and the step; behind them a greedy one
        asked = requests_of(numbered(self.prompts), group, purpose="evaluation", seed=SEED, step=0, greedy=True)
        said = self.rollouts.sample(asked, self.prompts)
        repeated = [prompt for prompt in self.prompts for _ in range(group + 1)]
        flat = [one for of_prompt in said for one in of_prompt]
        values = self.rollouts.score(repeated, flat).rewards.reshape(len(said), group + 1, -1).nan_to_num(0.0)
        found: Scores = {}
        if self.asked.rewards:
            summed = values[..., : len(self.asked.rewards)].sum(-1)
            found = {"reward": summed[:, :group].mean(1).tolist(), "greedy": summed[:, group].tolist()}
        if self.exact is not None:
            found["exact"] = values[:, :group, self.exact].mean(1).tolist()
        examples = [
            Example(prompt.prompt_ids, [self.rollouts.completion(one) for one in of_prompt[:group]], row=i)
            for i, (prompt, of_prompt) in enumerate(zip(self.prompts, said, strict=True))
        ]
        ratios = summed_by_row(examples, self.run, lambda b: self.policy(b).logps - self.start(b))
        found["kl"] = [sum(ratios[i]) / group for i in range(len(examples))]
        found["length"] = [sum(len(c.ids) for c in e.completions) / group for e in examples]
        return found

    def of_pairs(self, logps: Callable[[PackedBatch], Tensor]) -> list[tuple[float, float, int]]:
        """(log-prob of chosen, of rejected, tokens of chosen) of each held-out row, in order."""
        sums = summed_by_row(self.pairs, self.run, logps)
        return [(*sums[i], len(e.completions[0].ids)) for i, e in enumerate(self.pairs)]  # type: ignore[misc]

    def close(self) -> None:
        self.rollouts.close()


def summed_by_row(
    examples: Sequence[Example], run: Run, logps: Callable[[PackedBatch], Tensor]
) -> dict[int, list[float]]:
    """place of the example -> the sum over each of its completions."""
    places = {id(example): i for i, example in enumerate(examples)}
    found: dict[int, list[float]] = {}
    device, policy = run.accelerator.device, run.policy
    with torch.no_grad():
        for batch in pack(examples, run.config.train.first_micro_batch_tokens, **policy.packing):
            values = iter(logps(batch.to(device)).double().sum(-1).tolist())
            for example in batch.examples:
                found[places[id(example)]] = [next(values) for _ in example.completions]
    return found


def start_of(run: Run, policy: Policy) -> Reference:
    """What the run started from: the model with the adapters that it loaded, without its new ones, or a copy of it."""
    config = run.config.model
    if config.adapter_name_or_path is not None:
        model = add_adapters(load_model(config, run.accelerator.device), config, frozen_copy=False)
    elif policy.has_adapters:
        return AdapterReference(policy)
    else:
        model = copy.deepcopy(run.policy.model)
    return ModelReference(Policy(model, shared=policy.shared))
