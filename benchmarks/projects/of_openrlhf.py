"""OpenRLHF's losses (told of the global batch, where they ask for it), `models/loss.py`, and log-probs of logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from logratio.losses.types import CompletionLogps, Kind, Totals

from .installed import module_of
from .subjects import FLOAT32, GIVEN_SUMS, NEEDS_OLD, Subject, of, pairs, peer, rollouts

ABSENT = ("deepspeed", "ray", "openrlhf.trainer.ray")
ADVANTAGES: dict[str, dict[str, Any]] = {
    "group_norm": {},
    "rloo": {"scale": "linear"},
    "dr_grpo": {"scale": "linear"},
    "reinforce_baseline": {"independent": False},
    "flash_reinforce": {"scale": "linear", "shift": "step", "independent": False, "zero_sum": False},
}
POLICIES: dict[str, dict[str, Any]] = {
    "PolicyLoss ppo, token level": {},
    "PolicyLoss ppo, sequence level": {"token_level_loss": False},
    "PolicyLoss ppo, dual_clip=3": {"dual_clip": 3.0},
    "PolicyLoss gspo": {"policy_loss_type": "gspo"},
}


def told(totals: Totals) -> dict[str, float]:
    return {"batch_num_tokens": totals.num_tokens, "global_batch_size": totals.num_sequences}


def policy_loss(losses: Any, **options: Any) -> Any:
    asked = losses.PolicyLoss(**options)

    def fn(policy: CompletionLogps, advantages: Tensor, old: CompletionLogps, totals: Totals) -> Tensor:
        logps = policy.per_token_logps
        each = advantages[:, None].expand(len(advantages), logps.shape[1])
        mask = policy.completion_mask.to(logps.dtype)
        return asked(logps, old.per_token_logps, each, action_mask=mask, **told(totals))[0]

    return rollouts(fn)


def sft_loss(losses: Any, token_level: bool) -> Any:
    asked = losses.SFTLoss(token_level_loss=token_level)

    def fn(policy: CompletionLogps, totals: Totals) -> Tensor:
        logps = policy.per_token_logps
        return asked(logps, policy.completion_mask.to(logps.dtype), **told(totals))

    return peer(Kind.SEQUENCE, fn)


def advantage(name: str) -> Callable[[Tensor], Tensor]:
    """Its experience maker's, of completions of one token, without a penalty."""
    module_of("openrlhf.utils.logging_utils", ABSENT)  # so that its packages are there, and empty
    maker = module_of("openrlhf.trainer.ppo_utils.experience_maker", ABSENT).RemoteExperienceMaker

    def fn(rewards: Tensor) -> Tensor:
        count, size = rewards.numel(), rewards.shape[1]
        one = torch.ones(count, 1, dtype=torch.bool)
        batch = SimpleNamespace(
            index=list(range(count)), rewards=rewards.flatten(), action_mask=one, kl=0.0 * one, info={}, values=None
        )
        said = {"algo.advantage.estimator": name, "algo.advantage.gamma": 1.0, "rollout.n_samples_per_prompt": size}
        args = options(said | {"algo.advantage.no_std_norm": False})
        own = SimpleNamespace(
            strategy=SimpleNamespace(args=args), advantage_estimator=name, kl_ctl=SimpleNamespace(value=0.0)
        )
        own.get_cumulative_returns = functools.partial(maker.get_cumulative_returns, own)
        (done,) = maker.compute_advantages_and_returns(own, [batch])
        return done.advantages[:, 0].reshape(rewards.shape)

    return fn


def options(said: dict[str, Any]) -> Any:
    """Its nested arguments; what is not said is None."""

    class Options(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:
            return None

    top = Options(reward=Options(), algo=Options(advantage=Options()), rollout=Options(), actor=Options())
    for path, value in said.items():
        *parents, last = path.split(".")
        setattr(functools.reduce(getattr, parents, top), last, value)
    return top


def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    utils = module_of("openrlhf.models.utils", ABSENT)
    return utils.log_probs_from_logits(torch.nn.functional.linear(hidden, weight), targets)


def subjects() -> list[Subject]:
    losses = module_of("openrlhf.models.loss", ABSENT)
    out = [
        of("OpenRLHF", "loss", name, policy_loss(losses, **options), not_asked=NEEDS_OLD)
        for name, options in POLICIES.items()
    ]
    out += [
        of("OpenRLHF", "loss", f"SFTLoss, {name} level", sft_loss(losses, level))
        for name, level in (("token", True), ("sequence", False))
    ]
    for name, options in (("sigmoid", {}), ("label_smoothing=0.1", {"label_smoothing": 0.1}), ("ipo", {"ipo": True})):
        asked = losses.DPOLoss(beta=0.1, **options)
        fn = pairs(lambda *logps, asked=asked: asked(*logps)[0])
        out.append(of("OpenRLHF", "loss", f"DPOLoss {name}", fn, not_asked=GIVEN_SUMS))
    out += [
        of("OpenRLHF", "advantage", name, advantage(name), claims=claims | FLOAT32)
        for name, claims in ADVANTAGES.items()
    ]
    out.append(of("OpenRLHF", "head", "log_probs_from_logits", head))
    return out
