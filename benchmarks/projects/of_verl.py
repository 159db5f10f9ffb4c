"""verl's policy losses (told of the global batch, as its engines do) and advantages, `trainer/ppo/core_algos.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logratio.losses.types import CompletionLogps, Totals

from .installed import module_of
from .subjects import FLOAT32, LOW, NEEDS_OLD, STOPPED, Subject, of, rollouts

ABSENT = ("omegaconf", "tensordict", "ray", "codetiming", "orjson")
LOSSES = (
    ("vanilla", "token-mean"),
    ("vanilla", "seq-mean-token-sum"),
    ("vanilla", "seq-mean-token-mean"),
    ("vanilla", "seq-mean-token-sum-norm"),
    ("gspo", "seq-mean-token-mean"),
    ("sapo", "seq-mean-token-mean"),
    ("geo_mean", "seq-mean-token-mean"),
    ("cispo", "token-mean"),
    ("gpg", "token-mean"),
)
CLAIMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo_vectorized": {},
    "rloo": {"scale": "linear"},
    "rloo_vectorized": {"scale": "linear"},
    "opo": {"scale": "linear", "zero_sum": False},
    "reinforce_plus_plus": {"shift": "step", "independent": False, "zero_sum": False},
    "reinforce_plus_plus_baseline": {"independent": False},
    "remax": {"scale": "linear", "zero_sum": False},
    "gpg": {"scale": "linear", "independent": False},
    "grpo_passk": {"zero_sum": False},
}
OF_LENGTHS = ("opo", "reinforce_plus_plus")


@cache
def algorithms() -> Any:
    return module_of("verl.trainer.ppo.core_algos", ABSENT)


def loss(name: str, mode: str) -> Any:
    """With clip ratios of 0.2 and the other defaults of its `ActorConfig`."""
    options = {"strategy": "fsdp", "rollout_n": 2, "ppo_micro_batch_size_per_gpu": 1}
    config = module_of("verl.workers.config", ABSENT).ActorConfig(**options)
    asked = algorithms().get_policy_loss_fn(name)

    def fn(policy: CompletionLogps, advantages: Tensor, old: CompletionLogps, totals: Totals) -> Tensor:
        told = {"dp_size": 1, "batch_num_tokens": totals.num_tokens, "global_batch_size": totals.num_sequences}
        config.global_batch_info.update(told)
        logps = policy.per_token_logps
        each = advantages[:, None].expand(len(advantages), logps.shape[1])
        return asked(old.per_token_logps, logps, each, policy.completion_mask.to(logps.dtype), mode, config)[0]

    return rollouts(fn)


def advantage(name: str) -> Callable[..., Tensor]:
    """The reward stands at the last token; all completions have one, but where lengths count."""
    asked = algorithms().get_adv_estimator_fn(name)
    config = SimpleNamespace(gamma=1.0, get=lambda key, default=None: default)

    def estimated(rewards: Tensor, lengths: Tensor, baseline: Tensor | None = None) -> Tensor:
        flat, ends = rewards.flatten(), lengths.flatten()
        at = torch.arange(int(ends.max()))
        mask = (at < ends[:, None]).to(flat.dtype)
        scores = torch.where(at == ends[:, None] - 1, flat[:, None], 0.0)
        given: dict[str, Any] = {"token_level_rewards": scores, "response_mask": mask, "config": config}
        if name == "remax":
            given["reward_baselines"] = baseline.expand_as(rewards).flatten()  # type: ignore[union-attr]
        elif name != "reinforce_plus_plus":
            given["index"] = np.repeat(np.arange(len(rewards)), rewards.shape[1])
        out = asked(**given)[0]
        return out[:, 0].reshape(rewards.shape)

    if name in OF_LENGTHS:
        return lambda rewards, lengths: estimated(rewards, lengths)
    if name == "remax":
        return lambda rewards, baseline: estimated(rewards, torch.ones_like(rewards, dtype=torch.int64), baseline)
    return lambda rewards: estimated(rewards, torch.ones_like(rewards, dtype=torch.int64))


def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Its log-probs of logits."""
    functional = module_of("verl.utils.torch_functional", ABSENT)
    return functional.logprobs_from_logits(torch.nn.functional.linear(hidden, weight), targets)


def fused_head(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int = 512) -> Tensor:
    """`FusedLinearForPPO`, torch's backend."""
    fused = module_of("verl.utils.experimental.torch_functional", ABSENT).FusedLinearForPPO(chunk_size=chunk_tokens)
    return fused(hidden[None], weight, targets[None])[0][0]


def subjects() -> list[Subject]:
    out = []
    for name, mode in LOSSES:
        not_asked = NEEDS_OLD | (STOPPED if name == "cispo" else {})
        out.append(of("verl", "loss", f"{name}, {mode}", loss(name, mode), not_asked=not_asked))
    for name, claims in CLAIMS.items():
        out.append(of("verl", "advantage", name, advantage(name), claims=claims | FLOAT32))
    out.append(of("verl", "head", "logprobs_from_logits", head))
    out.append(of("verl", "head", "FusedLinearForPPO", fused_head, claims=LOW))
    return out
