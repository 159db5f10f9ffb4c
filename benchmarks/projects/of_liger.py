"""Liger's losses on log-probs, as its chunked losses call them, and the head under them; eager, on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logratio.losses.types import CompletionLogps, Totals

from .subjects import GIVEN_SUMS, LOW, SMOOTHED, STOPPED, Subject, of, pairs, pairs_alone, rollouts, share

DPO = ("sigmoid", "hinge", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
GRPO: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {},
    "dapo": {},
    "dapo, told num_items_in_batch": {"told": True},
    "luspo": {},
    "sapo": {},
    "cispo, told num_items_in_batch": {"told": True, "epsilon_high": 5.0},
    "vespo, told num_items_in_batch": {"told": True},
}


def grpo(told: bool = False, **options: Any) -> Any:
    """beta 0, if it is not given. A micro-batch's loss is weighted with its share of the step, but where the function
    knows the step."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction as Function

    def fn(
        policy: CompletionLogps, advantages: Tensor, old: Any, totals: Totals, ref: CompletionLogps | None = None
    ) -> Tensor:
        logps = policy.per_token_logps
        mask = policy.completion_mask.to(logps.dtype)
        given: dict[str, Any] = {"beta": 0.0, "use_bias_correction_kl": True, **options}
        given |= {"num_items_in_batch": torch.tensor(float(totals.num_tokens))} if told else {}
        for name, said in (("old", old), ("ref", ref)):
            given[f"{name}_per_token_logps"] = None if said is None else said.per_token_logps
        part = Function.ppo_loss_fn(logps, mask, advantages, mask, **given)[0]
        return part if told else share(policy, totals) * part

    return rollouts(fn)


def dpo(**options: Any) -> Any:
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction as Function

    def fn(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        refs = {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
        full = torch.zeros(2 * len(chosen), 1)
        return Function.preference_loss_fn(chosen, rejected, full, **refs, **options)[0]

    return pairs(fn)


def orpo(beta: float = 1.0) -> Any:
    from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction as Function

    def fn(chosen: Tensor, rejected: Tensor) -> Tensor:
        return Function.preference_loss_fn(chosen, rejected, torch.zeros(2 * len(chosen), 1), beta=beta)[0]

    return pairs_alone(fn, averages=True)


def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The chunked log-probs under its GRPO."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, targets[None])[0]


def subjects() -> list[Subject]:
    out = []
    for name, options in GRPO.items():
        stopped = STOPPED if name.startswith(("cispo", "vespo")) else {}
        fn = grpo(loss_type=name.partition(",")[0], **options)
        out.append(of("Liger", "loss", f"GRPO {name}", fn, not_asked=stopped))
    for name in DPO:
        fn = dpo(loss_type=name, **SMOOTHED.get(name, {}))
        out.append(of("Liger", "loss", f"DPO {name}", fn, not_asked=GIVEN_SUMS))
    out.append(of("Liger", "loss", "ORPO, the odds", orpo(), not_asked=GIVEN_SUMS))
    out.append(of("Liger", "head", "LigerFusedLinearPPOBase.chunk_forward", head, claims=LOW))
    return out
