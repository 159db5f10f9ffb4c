"""TRL's losses inside its trainers, given log-probs in the place of its model's; its advantages, and its head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from logratio.benchmarks.peers.peers import data_of, the_model
from logratio.benchmarks.peers.tensors import trainer_of
from logratio.losses.types import CompletionLogps, Kind, PairLogps, Totals
from logratio.reference import trl
from logratio.trainers.policy.tiny import tiny_tokenizer

from .subjects import FLOAT32, GIVEN_SUMS, STOPPED, Peer, Subject, of, pairs_alone, rollouts, share

GRPO = ("dapo", "grpo", "bnpo", "luspo", "sapo", "cispo", "vespo")
TOLD = ("dapo", "cispo", "vespo")
"""Those that divide by the tokens of the step."""
DPO = ("sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
CPO = ("sigmoid", "hinge", "ipo", "simpo")
ZEROS = {
    "mask": "its head returns 0 where nothing is scored",
    "low_precision": "its head makes the log-probs",
}


@contextmanager
def grpo(name: str) -> Iterator[Peer]:
    """beta 0, weights of the step as one window of accumulation."""
    row = {"prompt_ids": [1], "completion_ids": [1], "advantage": 1.0, "old_per_token_logps": [-1.0]}
    row |= {"ref_per_token_logps": [-1.0]}
    more = {"epsilon_high": 5.0} if name == "cispo" else {}
    with trainer_of("grpo", [row], loss_type=name, **more) as trainer:

        def fn(policy: CompletionLogps, advantages: Tensor, old: CompletionLogps | None, totals: Totals) -> Tensor:
            logps = policy.per_token_logps
            mask, prompt = policy.completion_mask.long(), torch.ones(len(logps), 1, dtype=torch.int64)
            inputs: dict[str, Any] = {"prompt_ids": prompt, "prompt_mask": prompt, "advantages": advantages}
            inputs |= {"completion_ids": mask, "completion_mask": mask}
            inputs["num_items_in_batch"] = torch.tensor(float(totals.num_tokens))
            if old is not None:
                inputs["old_per_token_logps"] = old.per_token_logps
            trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.zeros_like(logps), None)
            trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
            part = trainer._compute_loss(trainer.model, inputs)
            return part if name in TOLD else share(policy, totals) * part

        yield rollouts(fn)


@contextmanager
def dpo(name: str) -> Iterator[Peer]:
    """The model is one that returns the log-probs, 0 where nothing is scored, as TRL's head does."""
    options = {"label_smoothing": 0.1} if name == "robust" else {}
    with trainer_of("dpo", data_of("dpo").rows[:2], loss_type=name, **options) as trainer:

        def model(both: PairLogps, width: int) -> Callable[..., Any]:
            logps = torch.cat([pad(x.logps, (0, width - x.logps.shape[1])) for x in (both.chosen, both.rejected)])
            zero = torch.zeros_like(logps)
            others = dict.fromkeys(("entropy", "mean_logits", "log_sum_sq_probs"), zero)
            out = SimpleNamespace(log_probs=logps, is_top1=zero > 0, label_mask=zero == 0, **others)
            return lambda **_: out

        def called(policy: PairLogps, ref: PairLogps, totals: Totals) -> Tensor:
            masks = [policy.chosen.completion_mask, policy.rejected.completion_mask]
            width = max(mask.shape[1] for mask in masks)
            scored = torch.cat([pad(mask, (1, width - mask.shape[1])) for mask in masks]).long()
            inputs = {"input_ids": scored, "attention_mask": torch.ones_like(scored), "completion_mask": scored}
            trainer.ref_model = model(ref, width)
            return share(policy, totals) * trainer.compute_loss(model(policy, width), inputs)

        yield type("Pairs", (Peer,), {"kind": Kind.PAIRED, "wants_reference": True, "fn": staticmethod(called)})()


@contextmanager
def cpo(name: str) -> Iterator[Peer]:
    with trainer_of("cpo", data_of("cpo").rows[:2], loss_type=name) as trainer:
        yield pairs_alone(
            lambda chosen, rejected: trainer.cpo_loss(chosen, rejected)[0].mean(), averages=name == "simpo"
        )


@contextmanager
def orpo() -> Iterator[Peer]:
    with trainer_of("orpo", data_of("orpo").rows[:2], beta=1.0) as trainer:
        yield pairs_alone(lambda chosen, rejected: -trainer.odds_ratio_loss(chosen, rejected)[0].mean(), averages=True)


def advantage(method: str, **options: Any) -> Callable[[Tensor], Tensor]:
    """A trainer a call; NaN is None, a completion that no reward function scores."""

    def fn(rewards: Tensor) -> Tensor:
        rows = [[None if x != x else x] for x in rewards.flatten().tolist()]
        given = {"num_generations": rewards.shape[1], **options}
        found = trl.advantages(method, the_model(), tiny_tokenizer(), rows, **given)
        return torch.tensor(found, dtype=torch.float64).reshape(rewards.shape)

    return fn


def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(torch.nn.functional.linear(hidden, weight)[None], targets[None])[0]


def subjects() -> list[Subject]:
    out = []
    for name in GRPO:
        stopped = STOPPED if name in ("cispo", "vespo") else {}
        out.append(Subject("TRL", "loss", f"GRPO {name}", functools.partial(grpo, name), stopped))
    out += [Subject("TRL", "loss", f"DPO {name}", functools.partial(dpo, name), ZEROS) for name in DPO]
    out += [
        Subject("TRL", "loss", f"CPO {name}, the preference", functools.partial(cpo, name), GIVEN_SUMS) for name in CPO
    ]
    out.append(Subject("TRL", "loss", "ORPO, the odds", orpo, GIVEN_SUMS))
    out.append(of("TRL", "advantage", "GRPO", advantage("grpo"), claims=FLOAT32))
    out.append(of("TRL", "advantage", "RLOO", advantage("rloo"), claims={"scale": "linear", **FLOAT32}))
    out.append(of("TRL", "head", "selective_log_softmax", head))
    return out
