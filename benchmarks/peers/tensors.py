"""The losses of all three on given log-probabilities: TRL's own trainers are run with a model that returns them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, tensor

from logratio.losses import CompletionLogps, CPOLoss, DPOLoss, GRPOLoss, ORPOLoss, PairLogps, Totals
from logratio.reference._trl_batches import rollouts
from logratio.reference._trl_drive import built
from logratio.trainers.policy.tiny import tiny_tokenizer

from .peers import data_of, the_model


class Outcome(NamedTuple):
    """A loss and the largest entry of its gradient; or what was raised."""

    value: float = float("nan")
    gradient: float = float("nan")
    error: str = ""


def outcome(leaf: Tensor, loss: Tensor) -> Outcome:
    """leaf: what the gradient is taken with respect to. A NaN among its entries is the largest."""
    loss.sum().backward()
    assert leaf.grad is not None
    return Outcome(loss.sum().item(), leaf.grad.abs().max().item())


def guarded(compute: Callable[[], Outcome]) -> Outcome:
    """An error is an outcome."""
    try:
        return compute()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return Outcome(error=f"{type(error).__name__}: {str(error).splitlines()[0]}")


@contextmanager
def trainer_of(method: str, rows: Sequence[Any], **options: Any) -> Iterator[Any]:
    """TRL's trainer on the tiny model."""
    options["per_device_train_batch_size"] = max(2, len(rows))
    with built(method, the_model(), tiny_tokenizer(), rows, None, 1024, options) as trainer:
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        yield trainer


def leaves(values: Sequence[float]) -> Tensor:
    """[n], float32, with a gradient."""
    return tensor(values, dtype=torch.float32).requires_grad_()


# ---------------------------------------------------------------------------------------------- DPO
def split_ratio(r: float) -> tuple[float, float]:
    """Log-probs of policy and reference, at most 0, whose difference is r."""
    return min(r, 0.0), min(-r, 0.0)


def trl_dpo(chosen: float, rejected: float, **options: Any) -> Outcome:
    """Log-ratios of one pair."""
    pairs = [split_ratio(chosen), split_ratio(rejected)]
    leaf = leaves([policy for policy, _ in pairs])
    with trainer_of("dpo", data_of("dpo").rows[:1], **options) as trainer:
        batch = next(iter(trainer.get_train_dataloader()))
        mask = batch["completion_mask"][:, 1:]
        place = torch.nn.functional.one_hot(mask.argmax(1), mask.shape[1])  # the first scored token has it all

        def model(values: Tensor) -> Callable[..., Any]:
            zero = torch.zeros(mask.shape)
            others = dict.fromkeys(("entropy", "mean_logits", "log_sum_sq_probs"), zero)
            out = SimpleNamespace(log_probs=place * values[:, None], is_top1=zero > 0, label_mask=mask > 0, **others)
            return lambda **_: out

        trainer.ref_model = model(tensor([ref for _, ref in pairs]))
        return outcome(leaf, trainer.compute_loss(model(leaf), batch))


def liger_dpo(chosen: float, rejected: float, **options: Any) -> Outcome:
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction as Function

    (own_w, ref_w), (own_l, ref_l) = split_ratio(chosen), split_ratio(rejected)
    leaf = leaves([own_w, own_l])
    references = {"ref_chosen_logps": tensor([ref_w]), "ref_rejected_logps": tensor([ref_l])}
    loss = Function.preference_loss_fn(leaf[:1], leaf[1:], torch.zeros(2, 1), **references, **options)[0]
    return outcome(leaf, loss)


def one_token(values: Tensor) -> CompletionLogps:
    """One completion of one token."""
    return CompletionLogps(values.reshape(1, 1), torch.ones(1, 1, dtype=torch.bool))


def our_dpo(chosen: float, rejected: float, **options: Any) -> Outcome:
    (own_w, ref_w), (own_l, ref_l) = split_ratio(chosen), split_ratio(rejected)
    leaf = leaves([own_w, own_l])
    policy = PairLogps(one_token(leaf[0]), one_token(leaf[1]))
    reference = PairLogps(one_token(tensor(ref_w)), one_token(tensor(ref_l)))
    return outcome(leaf, DPOLoss(**options)(policy, reference, totals=Totals.of(policy)).loss)


# ---------------------------------------------------------------------------------------------- CPO, ORPO
def trl_cpo(chosen: float, rejected: float, **options: Any) -> Outcome:
    """Scores of one pair, sums or averages."""
    leaf = leaves([chosen, rejected])
    with trainer_of("cpo", data_of("cpo").rows[:1], **options) as trainer:
        return outcome(leaf, trainer.cpo_loss(leaf[:1], leaf[1:])[0])


def our_cpo(chosen: float, rejected: float, **options: Any) -> Outcome:
    leaf = leaves([chosen, rejected])
    policy = PairLogps(one_token(leaf[0]), one_token(leaf[1]))
    return outcome(leaf, CPOLoss(**options, cpo_alpha=0.0)(policy, totals=Totals.of(policy)).loss)


def trl_orpo(chosen: float, rejected: float) -> Outcome:
    """Average log-probs of one pair; the odds term."""
    leaf = leaves([chosen, rejected])
    with trainer_of("orpo", data_of("orpo").rows[:1], beta=1.0) as trainer:
        return outcome(leaf, -trainer.odds_ratio_loss(leaf[:1], leaf[1:])[0])


def liger_orpo(chosen: float, rejected: float) -> Outcome:
    from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction as Function

    leaf = leaves([chosen, rejected])
    return outcome(leaf, Function.preference_loss_fn(leaf[:1], leaf[1:], torch.zeros(2, 1), beta=1.0)[0])


def our_orpo(chosen: float, rejected: float) -> Outcome:
    """The odds term alone: the NLL, which is linear, is taken off."""
    leaf = leaves([chosen, rejected])
    policy = PairLogps(one_token(leaf[0]), one_token(leaf[1]))
    return outcome(leaf, ORPOLoss(beta=1.0)(policy, totals=Totals.of(policy)).loss + leaf[0])


# ---------------------------------------------------------------------------------------------- GRPO
class Rollout(NamedTuple):
    """One completion: log-probs of its tokens under the three models, its advantage, and the width it is padded to."""

    logps: Sequence[float]
    old: Sequence[float]
    ref: Sequence[float] | None = None
    advantage: float = 1.0
    width: int | None = None

    @property
    def padding(self) -> int:
        return (self.width or len(self.logps)) - len(self.logps)

    def padded(self, values: Sequence[float]) -> Tensor:
        return tensor([[*values, *[0.0] * self.padding]])


def trl_grpo(rollout: Rollout, method: str = "grpo", **options: Any) -> Outcome:
    n = len(rollout.logps)
    row = {
        "prompt_ids": [1],
        "completion_ids": [1] * n,
        "advantage": rollout.advantage,
        "old_per_token_logps": rollout.old,
        "ref_per_token_logps": rollout.ref or rollout.logps,
    }
    leaf = leaves(rollout.logps)
    with trainer_of(method, [row], **options) as trainer:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (leaf[None], torch.zeros(1, n), None)
        return outcome(leaf, trainer.compute_loss(trainer.model, rollouts(method, [row], 0)))


def liger_grpo(rollout: Rollout, **options: Any) -> Outcome:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction as Function

    leaf = leaves(rollout.logps)
    logps = torch.cat([leaf, torch.zeros(rollout.padding)])[None]
    mask = tensor([[1] * len(rollout.logps) + [0] * rollout.padding])
    loss = Function.ppo_loss_fn(
        logps,
        mask,
        tensor([rollout.advantage]),
        mask,
        ref_per_token_logps=rollout.padded(rollout.ref or rollout.logps),
        old_per_token_logps=rollout.padded(rollout.old),
        **{"beta": 0.0, "use_bias_correction_kl": True} | options,
    )[0]
    return outcome(leaf, loss)


def our_grpo(rollout: Rollout, **options: Any) -> Outcome:
    leaf = leaves(rollout.logps)
    mask = torch.arange(len(rollout.logps) + rollout.padding)[None] < len(rollout.logps)
    padding = torch.full((rollout.padding,), float("nan"))  # what is masked is never read
    policy = CompletionLogps(torch.cat([leaf, padding])[None], mask)
    old, ref = (CompletionLogps(rollout.padded(values), mask) for values in (rollout.old, rollout.ref or rollout.logps))
    loss = GRPOLoss(**options)
    references: dict[str, Any] = {"ref": ref} if loss.wants_reference else {}
    arguments: dict[str, Any] = {"advantages": tensor([rollout.advantage]), "old": old, "totals": Totals.of(policy)}
    return outcome(leaf, loss(policy, **references, **arguments).loss)
