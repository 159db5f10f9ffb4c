"""GRPO's data: completions sampled from the policy, scored by rewards, compared within their group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from logratio.losses import Mean

from .config import RolloutConfig
from .data import Completion, Example, Prompt
from .policy import Policy
from .reference import inference
from .rewards import Reward, call_reward

# Completions generated at a time. Not an option: which random numbers a completion gets depends on it.
GENERATION_ROWS = 256
ADVANTAGE_EPS = 1e-4


def advantages(rewards: torch.Tensor, scale_rewards: Literal["group", "none"] = "group") -> torch.Tensor:
    """A = (R - mean) / (std + 1e-4) of each group, [groups, G] float64 (arXiv 2402.03300).

    The standard deviation has Bessel's correction; "none" does not divide by it (Dr. GRPO, arXiv 2503.20783). Equal
    rewards give exactly 0. NaN rewards (no reward function had an opinion) give 0 and do not count, as in TRL.
    """
    rewards = rewards.double()
    known = ~rewards.isnan()
    count = known.sum(1, keepdim=True)
    mean = torch.nansum(rewards, 1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(known, rewards - mean, 0.0)
    if scale_rewards == "group":
        std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + ADVANTAGE_EPS)
    highest = rewards.nan_to_num(-torch.inf).amax(1, keepdim=True)
    lowest = rewards.nan_to_num(torch.inf).amin(1, keepdim=True)
    return torch.where(highest > lowest, centred, 0.0)


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


class Rollouts:
    """Prompts -> examples with advantages, and TRL's reward metrics."""

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

    def __call__(self, prompts: Sequence[Prompt]) -> tuple[list[Example], dict[str, Mean]]:
        """One example a prompt, with `num_generations` completions."""
        group = self.config.num_generations
        repeated = [prompt for prompt in prompts for _ in range(group)]
        sampled = generate(
            self.policy,
            self.tokenizer,
            repeated,
            max_new_tokens=self.max_completion_length,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
        )
        by_function = self.score(repeated, sampled)
        known = ~by_function.isnan()
        total = torch.where(known.any(1), (by_function.nan_to_num() * self.weights).sum(1), torch.nan)
        grouped = total.view(-1, group)
        adv = advantages(grouped, self.config.scale_rewards).tolist()
        examples = [
            Example(
                prompt.prompt_ids,
                [Completion(s.ids) for s in sampled[i * group : (i + 1) * group]],
                row=prompt.row,
                advantages=tuple(adv[i]),
            )
            for i, prompt in enumerate(prompts)
        ]
        return examples, self._metrics(sampled, by_function, grouped)

    def score(self, prompts: Sequence[Prompt], sampled: Sequence[Sampled]) -> torch.Tensor:
        """[completions, functions] float64, NaN where a reward function returned None."""
        texts = self.tokenizer.batch_decode([s.ids for s in sampled], skip_special_tokens=True)
        chat = [not isinstance(p.prompt, str) for p in prompts]
        completions = [[{"role": "assistant", "content": t}] if c else t for t, c in zip(texts, chat, strict=True)]
        scores = torch.full((len(sampled), len(self.rewards)), torch.nan, dtype=torch.float64)
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

    def _metrics(self, sampled: Sequence[Sampled], by_function: torch.Tensor, grouped: torch.Tensor) -> dict[str, Mean]:
        lengths = torch.tensor([float(len(s.ids)) for s in sampled])
        spread = (grouped.nan_to_num(0.0)).std(1)
        metrics = {
            "reward": Mean.of(grouped, ~grouped.isnan()),
            "reward_std": Mean.of(spread),
            "frac_reward_zero_std": Mean.of((spread == 0).double()),
            "completions/mean_length": Mean.of(lengths),
            "completions/clipped_ratio": Mean.of(torch.tensor([float(not s.ended) for s in sampled])),
        }
        for column, name in enumerate(self.rewards):
            values = by_function[:, column]
            metrics[f"rewards/{name}/mean"] = Mean.of(values, ~values.isnan())
        return metrics
