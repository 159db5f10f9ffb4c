"""GRPO's data: completions sampled from the policy, scored by rewards, compared within their group."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import GenerationConfig

from logratio.losses import ADVANTAGES, KL_ESTIMATORS, Mean
from logratio.losses.advantages import AGGREGATIONS, advantages_of, sum_then_normalize

from ..config import RolloutConfig
from ..data.examples import Completion, Example, Prompt
from ..errors import UserError
from ..policy.policy import Policy
from ..policy.reference import inference
from ..step import MicroBatch, gather_rows
from .rewards import Reward, call_reward

# Completions generated at a time. Not an option: which random numbers a completion gets depends on it.
GENERATION_ROWS = 256


@dataclass(frozen=True)
class Sampled:
    """token ids with the EOS that ended them; `ended` is False where max_completion_length cut them."""

    ids: list[int]
    ended: bool


@contextlib.contextmanager
def plain_sampling(model: Any) -> Iterator[None]:
    """Inside, the checkpoint's own defaults (a repetition penalty, min_p, ...) do not apply: they would sample from
    another distribution than the one whose log-probs are trained."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


@torch.no_grad()
def generate(
    policy: Policy, tokenizer: Any, prompts: Sequence[Prompt], *, max_new_tokens: int, **sampling: Any
) -> list[Sampled]:
    """One completion of each prompt, in order. sampling: `temperature`, `top_p`, or `do_sample=False`."""
    device = next(policy.parameters()).device
    stop = policy.causal_lm.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    done: list[Sampled] = []
    for start in range(0, len(prompts), GENERATION_ROWS):
        part = prompts[start : start + GENERATION_ROWS]
        width = max(len(p.prompt_ids) for p in part)
        ids = torch.full((len(part), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(part):
            ids[row, width - len(prompt.prompt_ids) :] = torch.tensor(prompt.prompt_ids)
            mask[row, width - len(prompt.prompt_ids) :] = 1
        with inference(policy), plain_sampling(policy.causal_lm):
            out = policy.causal_lm.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=sorted(stops),
                **(sampling if "do_sample" in sampling else {"do_sample": True, "top_k": 0, **sampling}),
            )
        for tokens in out[:, width:].tolist():
            end = next((i for i, token in enumerate(tokens) if token in stops), None)
            done.append(Sampled(tokens if end is None else tokens[: end + 1], end is not None))
    return done


@dataclass(frozen=True)
class Rolled:
    """A process's rollouts, before they are compared.

    examples: one a prompt, with `num_generations` completions and no advantages yet.
    by_function: [prompts, G, K] float64 rewards, NaN where a reward function returned None.
    baseline: [prompts, 1] float64 reward of a greedy completion, where the advantages want it.
    metrics: of the completions themselves.
    """

    examples: list[Example]
    by_function: Tensor
    baseline: Tensor | None = None
    metrics: dict[str, Mean] = field(default_factory=dict)


class Rollouts:
    """Prompts -> completions and their rewards -> advantages, and TRL's reward metrics."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        config: RolloutConfig,
        rewards: dict[str, Reward],
        max_completion_length: int,
    ) -> None:
        self.policy, self.tokenizer, self.config, self.rewards = policy, tokenizer, config, rewards
        self.max_completion_length = max_completion_length
        self.weights = torch.tensor(config.reward_weights or [1.0] * len(rewards), dtype=torch.float64)

    def __call__(self, prompts: Sequence[Prompt], *, greedy: bool = True) -> Rolled:
        """Sample `num_generations` completions of each prompt, and score them.

        greedy: score a greedy completion too, where the advantages want it (not for an evaluation).
        """
        group = self.config.num_generations
        repeated = [prompt for prompt in prompts for _ in range(group)]
        sampled = self.generate(repeated, temperature=self.config.temperature, top_p=self.config.top_p)
        by_function = self.score(repeated, sampled).reshape(len(prompts), group, len(self.rewards))
        baseline = None
        if greedy and ADVANTAGES[self.config.advantage_type].wants_greedy:
            scores = self.score(prompts, self.generate(prompts, do_sample=False))
            baseline = sum_then_normalize(scores[:, None], self.weights)
        examples = [
            Example(
                prompt.prompt_ids,
                [self.completion(s) for s in sampled[i * group : (i + 1) * group]],
                row=prompt.row,
            )
            for i, prompt in enumerate(prompts)
        ]
        metrics = {
            "completions/mean_length": Mean.of(torch.tensor([float(len(s.ids)) for s in sampled])),
            "completions/clipped_ratio": Mean.of(torch.tensor([float(not s.ended) for s in sampled])),
        }
        return Rolled(examples, by_function, baseline, metrics)

    def generate(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Sampled]:
        return generate(self.policy, self.tokenizer, prompts, max_new_tokens=self.max_completion_length, **sampling)

    def completion(self, sampled: Sampled) -> Completion:
        cut = self.config.mask_truncated_completions and not sampled.ended
        return Completion(sampled.ids, [False] * len(sampled.ids) if cut else None)

    def score(self, prompts: Sequence[Prompt], sampled: Sequence[Sampled]) -> Tensor:
        """[completions, functions] float64, NaN where a reward function returned None."""
        scores = torch.full((len(sampled), len(self.rewards)), torch.nan, dtype=torch.float64)
        if not sampled:
            return scores
        texts = self.tokenizer.batch_decode([s.ids for s in sampled], skip_special_tokens=True)
        chat = [not isinstance(p.prompt, str) for p in prompts]
        completions = [[{"role": "assistant", "content": t}] if c else t for t, c in zip(texts, chat, strict=True)]
        for column, (name, reward) in enumerate(self.rewards.items()):
            values = call_reward(
                name,
                reward,
                prompts=[p.prompt for p in prompts],
                completions=completions,
                completion_ids=[s.ids for s in sampled],
                max_completion_length=self.max_completion_length,
                columns={key: [p.columns[key] for p in prompts] for key in prompts[0].columns},
            )
            scores[:, column] = torch.tensor([torch.nan if v is None else v for v in values], dtype=torch.float64)
        return scores

    def advantages(self, rolled: Rolled, accelerator: Accelerator, kl: Tensor | None = None) -> Tensor:
        """[prompts, G] float64 advantages of a process's rollouts, among those of the step on all processes.

        kl: [prompts, G], what `reward_kl_coef` weighs: the divergence of each completion from the reference.
        """
        config, (prompts, group, functions) = self.config, rolled.by_function.shape
        lengths = torch.tensor([len(c.ids) for e in rolled.examples for c in e.completions], dtype=torch.float64)
        others = [
            lengths.reshape(prompts, group),
            torch.zeros(prompts, group) if rolled.baseline is None else rolled.baseline.expand(-1, group),
            torch.zeros(prompts, group) if kl is None else kl,
        ]
        columns = torch.cat([rolled.by_function, torch.stack(others, -1)], -1)
        everyone, own = gather_rows(accelerator, columns)
        by_function, (lengths, baseline, kl) = everyone[..., :functions], everyone[..., functions:].unbind(-1)
        rewards = AGGREGATIONS[config.multi_objective_aggregation](by_function, self.weights)
        gdpo = config.multi_objective_aggregation == "normalize_then_sum"
        return advantages_of(
            rewards - config.reward_kl_coef * kl,
            "reinforce_pp" if gdpo else config.advantage_type,
            scale=config.scale_rewards,
            lengths=lengths,
            baseline=baseline[:, :1],
            normalize_advantages=config.normalize_advantages,
        )[own]

    def metrics(self, rolled: Rolled, accelerator: Accelerator) -> dict[str, Mean]:
        """TRL's, of what the reward functions said (a KL penalty is not in them); this process's share."""
        rewards = sum_then_normalize(rolled.by_function, self.weights)
        everyone, _ = gather_rows(accelerator, rewards)
        known = everyone[~everyone.isnan()]
        counts = (~rewards.isnan()).sum(1)
        equal = rewards.nan_to_num(-torch.inf).amax(1) == rewards.nan_to_num(torch.inf).amin(1)
        metrics = {
            **rolled.metrics,
            "reward": Mean.of(rewards, ~rewards.isnan()),
            "reward_std": Mean.of(known.std().view(1) if len(known) > 1 else known[:0]),
            "frac_reward_zero_std": Mean.of((equal & (counts > 1)).double()),
        }
        for column, name in enumerate(self.rewards):
            values = rolled.by_function[..., column]
            metrics[f"rewards/{name}/mean"] = Mean.of(values, ~values.isnan())
        return metrics


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
                "use float32, or another --reward_kl_estimator"
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
