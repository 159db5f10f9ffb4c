"""TRL's losses inside its trainers, given log-probs in the place of its model's; its advantages, and its head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from logratio.benchmarks.peers.peers import data_of, the_model
from logratio.losses.types import CompletionLogps, Kind, PairLogps, Totals
from logratio.reference import trl
from logratio.reference._trl_drive import built
from logratio.trainers.policy.tiny import tiny_tokenizer

from .subjects import FLOAT32, GIVEN_SUMS, SMOOTHED, STOPPED, Peer, Subject, of, pairs_alone, peer, rollouts, share

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
def trainer_of(method: str, rows: Sequence[Any], **options: Any) -> Iterator[Any]:
    """TRL's trainer on the tiny model."""
    options["per_device_train_batch_size"] = max(2, len(rows))
    with built(method, the_model(), tiny_tokenizer(), rows, None, 1024, options) as trainer:
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        yield trainer


@contextmanager
def grpo(method: str = "grpo", **options: Any) -> Iterator[Peer]:
    """The step as one window of accumulation. method: grpo or rloo."""
    row = {"prompt_ids": [1], "completion_ids": [1], "advantage": 1.0, "old_per_token_logps": [-1.0]}
    row |= {"ref_per_token_logps": [-1.0]}
    with trainer_of(method, [row], **options) as trainer:

        def fn(
            policy: CompletionLogps, advantages: Tensor, old: Any, totals: Totals, ref: CompletionLogps | None = None
        ) -> Tensor:
            logps = policy.per_token_logps
            mask, prompt = policy.completion_mask.long(), torch.ones(len(logps), 1, dtype=torch.int64)
            inputs: dict[str, Any] = {"prompt_ids": prompt, "prompt_mask": prompt, "advantages": advantages}
            inputs |= {"completion_ids": mask, "completion_mask": mask}
            inputs["num_items_in_batch"] = torch.tensor(float(totals.num_tokens))
            for name, said in (("old", old), ("ref", ref)):
                if said is not None:
                    inputs |= {f"{name}_per_token_logps": said.per_token_logps, f"{name}_logps": said.sums}
            trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.zeros_like(logps), None)
            trainer.args.steps_per_generation = 1
            part = trainer.compute_loss(trainer.model, inputs)
            return part if options.get("loss_type", TOLD[0]) in TOLD else share(policy, totals) * part

        yield rollouts(fn)


@contextmanager
def dpo(**options: Any) -> Iterator[Peer]:
    """The model is one that returns the log-probs, 0 where nothing is scored, as TRL's head does."""
    with trainer_of("dpo", data_of("dpo").rows[:2], **options) as trainer:

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

        yield peer(Kind.PAIRED, called, wants_reference=True)


@contextmanager
def cpo(averages: bool = False, **options: Any) -> Iterator[Peer]:
    with trainer_of("cpo", data_of("cpo").rows[:2], **options) as trainer:
        yield pairs_alone(lambda chosen, rejected: trainer.cpo_loss(chosen, rejected)[0].mean(), averages)


@contextmanager
def orpo(beta: float = 1.0) -> Iterator[Peer]:
    with trainer_of("orpo", data_of("orpo").rows[:2], beta=beta) as trainer:
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
        more: dict[str, Any] = {"epsilon_high": 5.0} if name == "cispo" else {}
        opened = functools.partial(grpo, loss_type=name, **more)
        out.append(Subject("TRL", "loss", f"GRPO {name}", opened, stopped))
    for name in DPO:
        opened = functools.partial(dpo, loss_type=name, **SMOOTHED.get(name, {}))
        out.append(Subject("TRL", "loss", f"DPO {name}", opened, ZEROS))
    for name in CPO:
        opened = functools.partial(cpo, averages=name == "simpo", loss_type=name)
        out.append(Subject("TRL", "loss", f"CPO {name}, the preference", opened, GIVEN_SUMS))
    out.append(Subject("TRL", "loss", "ORPO, the odds", orpo, GIVEN_SUMS))
    out.append(of("TRL", "advantage", "GRPO", advantage("grpo"), claims=FLOAT32))
    out.append(of("TRL", "advantage", "RLOO", advantage("rloo"), claims={"scale": "linear", **FLOAT32}))
    out.append(of("TRL", "head", "selective_log_softmax", head))
    return out
