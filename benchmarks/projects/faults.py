"""Inputs at which a peer is not finite, wrong or raises: each is run, by the peers that have the fault and by ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, tensor

from logratio.benchmarks.peers.peers import data_of, ours, the_model, trls
from logratio.losses import CompletionLogps, CPOLoss, DPOLoss, GRPOLoss, Kind, ORPOLoss, PairLogps, Totals
from logratio.losses.advantages import advantages_of
from logratio.reference import trl
from logratio.trainers.policy.tiny import tiny_tokenizer

from . import of_liger, of_trl
from .subjects import peer

TOLERANCE = 1e-3
"""Relative error beyond which a value is wrong."""


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


@dataclass(frozen=True)
class Fault:
    """What happens, and each implementation's run of it; a peer that is left out has not got the loss, or is sound.

    exact: the loss in exact arithmetic, worked out by hand; None where only a finite value is asked for, since float32
    cannot hold it.
    """

    name: str
    cause: str
    exact: float | None
    ours: Callable[[], Outcome]
    trl: Callable[[], Outcome] | None = None
    liger: Callable[[], Outcome] | None = None


def measure_fault(fault: Fault) -> dict[str, Any]:
    """Its row, with what came out of everyone."""
    row: dict[str, Any] = {"fault": fault.name, "cause": fault.cause, "exact": fault.exact}
    for name in ("trl", "liger", "ours"):
        if (run := getattr(fault, name)) is not None:
            out = guarded(run)
            row[name] = {"shown": shown(out), "sound": sound(out, fault.exact)}
    return row


def sound(out: Outcome, exact: float | None) -> bool:
    """No error, finite in value and gradient, and right."""
    if out.error or not math.isfinite(out.value) or not math.isfinite(out.gradient):
        return False
    return exact is None or abs(out.value - exact) <= TOLERANCE * abs(exact)


def shown(out: Outcome) -> str:
    """For a table."""
    return out.error[:60] or f"{out.value:.4g}, gradient {out.gradient:.4g}"


def pair(logps: Tensor) -> PairLogps:
    """Of two completions of one token."""
    chosen, rejected = (CompletionLogps(x.reshape(1, 1), torch.ones(1, 1, dtype=torch.bool)) for x in logps)
    return PairLogps(chosen, rejected)


def of_pair(opened: AbstractContextManager[Any], scores: Sequence[float]) -> Outcome:
    """scores: of chosen and rejected, sums and averages at once; log-ratios where the loss has a reference."""
    with opened as loss:
        leaf = tensor([min(x, 0.0) for x in scores] if loss.wants_reference else scores).requires_grad_()
        policy = pair(leaf)
        ref = {"ref": pair(tensor([min(-x, 0.0) for x in scores]))} if loss.wants_reference else {}
        return outcome(leaf, loss(policy, **ref, totals=Totals.of(policy)).loss)


def odds(beta: float = 1.0) -> Any:
    """ORPO's odds term alone: the NLL, which is linear, is taken off."""
    loss = ORPOLoss(beta=beta)
    return peer(Kind.PAIRED, lambda policy, totals: loss(policy, totals=totals).loss + policy.chosen.sums.sum())


OURS: dict[str, Callable[..., Any]] = {
    "dpo": DPOLoss,
    "cpo": lambda **options: CPOLoss(cpo_alpha=0.0, **options),
    "orpo": odds,
}


def pairs(method: str, *scores: float, liger: bool = False, **options: Any) -> dict[str, Callable[[], Outcome]]:
    """The same pair under everyone."""
    runs = {
        "ours": lambda: of_pair(nullcontext(OURS[method](**options)), scores),
        "trl": lambda: of_pair(getattr(of_trl, method)(**options), scores),
    }
    if liger:
        runs["liger"] = lambda: of_pair(nullcontext(getattr(of_liger, method)(**options)), scores)
    return runs


class Rollout(NamedTuple):
    """One completion: log-probs of its tokens under the three models, its advantage, and the width it is padded to."""

    logps: Sequence[float]
    old: Sequence[float]
    ref: Sequence[float] | None = None
    advantage: float = 1.0
    width: int | None = None

    def of(self, values: Sequence[float] | Tensor, padding: float = 0.0) -> CompletionLogps:
        padded = torch.full((1, self.width or len(self.logps)), padding)
        padded[0, : len(values)] = torch.as_tensor(values)
        return CompletionLogps(padded, torch.arange(padded.shape[1])[None] < len(self.logps))


def of_rollout(
    opened: AbstractContextManager[Any], one: Rollout, reference: bool = True, padding: float = 0.0
) -> Outcome:
    """reference: whether the loss takes one. padding: of the policy's log-probs."""
    with opened as loss:
        leaf = tensor(one.logps).requires_grad_()
        policy = one.of(leaf, padding)
        ref = {"ref": one.of(one.ref or one.logps)} if reference else {}
        given: dict[str, Any] = {"advantages": tensor([one.advantage]), "old": one.of(one.old), **ref}
        return outcome(leaf, loss(policy, **given, totals=Totals.of(policy)).loss)


def rollout(one: Rollout, *, trl: str | None = "grpo", liger: bool = True, **options: Any) -> dict[str, Any]:
    """The same rollout under everyone."""
    loss = GRPOLoss(**options)
    # what is masked is never read
    runs: dict[str, Any] = {"ours": lambda: of_rollout(nullcontext(loss), one, loss.wants_reference, math.nan)}
    if trl:
        asked = {k: v for k, v in options.items() if trl == "grpo" or k != "loss_type"}
        runs["trl"] = lambda: of_rollout(of_trl.grpo(trl, **asked), one)
    return runs | ({"liger": lambda: of_rollout(nullcontext(of_liger.grpo(**options)), one)} if liger else {})


def of_gradient(gradient: Any) -> Outcome:
    return Outcome(gradient.loss, max(g.abs().max().item() for g in gradient.grads.values()))


WEIGHTED = {"loss_type": ("sigmoid", "sft"), "use_weighting": True}
EQUAL_REWARDS = [[0.3]] * 8


def trl_equal_rewards() -> Outcome:
    values = trl.advantages("grpo", the_model(), tiny_tokenizer(), EQUAL_REWARDS, num_generations=8)
    return Outcome(values[0], 0.0)


SIMPO: dict[str, Any] = {"loss_type": "simpo", "cpo_alpha": 0.0}


def trl_empty_completion() -> Outcome:
    """Two pairs; the second one's prompt fills `max_length`."""
    rows = [data_of("cpo").rows[0], dict(data_of("cpo").rows[1], prompt="long " * 40)]
    return of_gradient(trl.loss_and_grads("cpo", the_model(), tiny_tokenizer(), rows, max_length=200, **SIMPO))


def our_empty_completion() -> Outcome:
    leaf = torch.full((2, 1), -1.0, requires_grad=True)
    side = CompletionLogps(leaf, torch.tensor([[True], [False]]))
    policy = PairLogps(side, side)
    return outcome(leaf, CPOLoss(**SIMPO)(policy, totals=Totals.of(policy)).loss)


def alphapo(chosen: float, rejected: float, alpha: float, beta: float, gamma: float) -> float:
    scores = [-math.expm1(-alpha * a) / alpha for a in (chosen, rejected)]
    x = gamma - beta * (scores[0] - scores[1])
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


far, wide = Rollout([-1.0], [-91.0]), Rollout([-1.0] * 3, [-1.0 - math.log(1.1)] * 3, width=9)

FAULTS = [
    Fault(
        "DPO discopop, beta Delta = -100",
        "m exp(-x) with m = sigmoid(x / tau) = 0 and exp(-x) = inf",
        100.0,
        **pairs("dpo", -1000.0, 0.0, liger=True, loss_type="discopop"),
    ),
    Fault(
        "DPO forward_kl, both log-ratios -100",
        "(1 - exp(-r_w)) - (1 - exp(-r_l)) = inf - inf beyond r < -88.7",
        math.log(2),
        **pairs("dpo", -100.0, -100.0, f_divergence_type="forward_kl"),
    ),
    Fault(
        "DPO forward_kl, the chosen's log-ratio -100",
        "1 - exp(-r) = -inf beyond r < -88.7",
        None,
        **pairs("dpo", -100.0, 0.0, f_divergence_type="forward_kl"),
    ),
    Fault(
        "DPO sigmoid + sft with use_weighting",
        "the sft term is an expanded scalar, multiplied in place",
        None,
        ours=lambda: of_gradient(ours("dpo", WEIGHTED)),
        trl=lambda: of_gradient(trls("dpo", WEIGHTED)),
    ),
    Fault(
        "CPO alphapo, a_w = -110 (alpha 0.25)",
        "(1 - exp(a)^(-alpha)) / alpha with exp(a) = 0 beyond a < -104",
        alphapo(-110.0, -1.0, 0.25, 0.1, 0.5),
        **pairs("cpo", -110.0, -1.0, loss_type="alphapo", alpha=0.25),
    ),
    Fault(
        "CPO sigmoid with alpha 0.25, s_w = -150, s_l = -120",
        "the same of sums over tokens: inf - inf at completions of ordinary length",
        alphapo(-150.0, -120.0, 0.25, 0.1, 0.0),
        **pairs("cpo", -150.0, -120.0, loss_type="sigmoid", alpha=0.25),
    ),
    Fault(
        "CPO alphapo, alpha 1e-6, a_w = -1, a_l = -2",
        "1 - exp(a)^(-alpha) cancels; expm1 does not",
        alphapo(-1.0, -2.0, 1e-6, 2.5, 0.5),
        **pairs("cpo", -1.0, -2.0, loss_type="alphapo", alpha=1e-6, beta=2.5, simpo_gamma=0.5),
    ),
    Fault(
        "CPO simpo, a prompt that fills max_length",
        "sum / |y| = 0 / 0, for the whole batch",
        None,
        ours=our_empty_completion,
        trl=trl_empty_completion,
    ),
    Fault(
        "ORPO, a_w = 0",
        "the slope of log(1 - exp(a)) is infinite, times 0",
        None,
        **pairs("orpo", 0.0, -1.0, liger=True),
    ),
    Fault(
        "ORPO, a_w = -1e-8",
        "log1p(-exp(a)) = log(0) in float32 from a > -6e-8 on",
        None,
        **{who: run for who, run in pairs("orpo", -1e-8, -1.0, liger=True).items() if who != "trl"},
    ),
    Fault("GRPO dapo, log-ratio 90, A = 1", "clipped, but rho = inf: gradient 0 * inf", -1.2, **rollout(far)),
    Fault("GRPO dapo, log-ratio 90, A = -1", "rho = inf", None, **rollout(far._replace(advantage=-1.0))),
    Fault("GRPO sapo, log-ratio 90, A = 1", "sigmoid'(inf) * inf = 0 * inf", -4.0, **rollout(far, loss_type="sapo")),
    Fault(
        "GRPO with beta 1, log p_ref - log p = 90",
        "k3 = exp(-d) + d - 1 = inf",
        None,
        **rollout(Rollout([-91.0], [-91.0], [-1.0]), beta=1.0),
    ),
    Fault(
        "GRPO with beta 1, log p_ref - log p = -1e-4, A = 0",
        "exp(-d) + d - 1 cancels; expm1(-d) + d does not",
        math.expm1(-1e-4) + 1e-4,
        **rollout(Rollout([0.0], [0.0], [-1e-4], advantage=0.0), beta=1.0),
    ),
    Fault(
        "RLOO, 30 tokens of log-ratio 3, A = 1",
        "W = exp(sum of log-ratios) = inf: gradient 0 * inf",
        -1.2,
        **rollout(Rollout([-1.0] * 30, [-4.0] * 30), trl="rloo", liger=False, loss_type="rloo"),
    ),
    Fault(
        "GRPO luspo, 3 tokens of rho = 1.1 padded to 9",
        "padding counts: |y| sum_{t <= T} l_t / T instead of sum_{t <= |y|} l_t",
        -3.3,
        **rollout(wide, trl=None, loss_type="luspo"),
    ),
    Fault(
        "Advantages of eight equal rewards 0.3",
        "the rounding of their mean in float32, over std + 1e-4",
        0.0,
        ours=lambda: Outcome(advantages_of(torch.tensor(EQUAL_REWARDS).T)[0, 0].item(), 0.0),
        trl=trl_equal_rewards,
    ),
]
