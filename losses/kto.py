"""Kahneman-Tversky Optimization (Ethayarajh et al., arXiv 2402.01306): single completions with a thumb up or down.

With r the log-ratio to the reference summed over completion tokens, and z the step's estimate of
KL(policy || reference), Eqs. 7 and 8:

    desirable:    w_d (1 - sigmoid(beta (r - z)))        undesirable:  w_u (1 - sigmoid(beta (z - r)))
    z = max(0, mean over the step of the log-ratios of mismatched completions), without gradient

A variant is a value function of the signed distance from a shift, and the shift, entered in `KTO_TYPES`.

Differs from TRL 1.16: (1) z is one number for the optimizer step and all processes; TRL's is one a micro-batch;
(2) `bco` is not in TRL any more.
Differs from the papers: (3) as in TRL, the sum is divided by the number of examples, not of their weights; (4) the
density ratios that BCO weighs undesirable examples by (UDM, arXiv 2404.04656) come with the rows, as `weights`: who
has prompts' embeddings makes them by a classifier, p / (1 - p) of p = P(desirable | prompt), in TRL's BCOTrainer of old
clipped to 0.5 and 10; (5) `humanline_clip` bounds the mismatched log-ratios too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .options import NotNegative, Positive, Variants
from .registry import register
from .token_metrics import token_metrics
from .token_ratios import check_clip, clipped
from .types import CompletionLogps, Kind, Loss, LossOutput, Mean, Totals, choose, divide


class KTOType(NamedTuple):
    """value(x [C]) -> the loss of an example whose reward lies x above the shift (below, for label False), [C].

    shift(totals, loss): what rewards beta r are compared with, scalar, without gradient.
    window_pass: what the shift is computed from, see `Loss.window_pass`.
    """

    value: Callable[[Tensor], Tensor]
    shift: Callable[[Totals, KTOLoss], Tensor]
    window_pass: Literal["own", "mismatched"] | None


def saturating(x: Tensor) -> Tensor:
    """1 - sigmoid(x), arXiv 2402.01306 Eq. 7."""
    return (-x).sigmoid()


def logistic(x: Tensor) -> Tensor:
    """-log sigmoid(x), arXiv 2404.04656: convex, never saturated on the wrong side."""
    return -logsigmoid(x)


def kl_estimate(totals: Totals, loss: KTOLoss) -> Tensor:
    """beta z, z = max(0, mean of mismatched log-ratios)."""
    if totals.collected is None or totals.collected.numel() == 0:
        raise ValueError(
            "KTO's KL term needs the log-ratios of mismatched completions in totals.collected; "
            "a step of one example has none, so use at least two examples a step"
        )
    return loss.beta * totals.collected.detach().mean().clamp(min=0)


def nothing(totals: Totals, loss: KTOLoss) -> Tensor:
    """0"""
    return torch.zeros(())


def running_mean(totals: Totals, loss: KTOLoss) -> Tensor:
    """delta, the mean reward beta r of all examples so far, this step's included."""
    total, count = rewards_so_far(totals, loss)
    return total / count.clamp(min=1)


def rewards_so_far(totals: Totals, loss: KTOLoss) -> tuple[Tensor, Tensor]:
    """Sum (float64) and number of the rewards beta r of all examples so far, this step's included."""
    if totals.collected is None:
        raise ValueError("bco shifts rewards by their running mean: it needs the step's in totals.collected")
    rewards = loss.beta * totals.collected.double()
    return (
        totals.state.get("reward_sum", 0.0) + rewards.nansum(),
        totals.state.get("num_examples", 0.0) + (~rewards.isnan()).sum(),
    )


KTO_TYPES: Variants[KTOType] = Variants()
"""loss_type -> the loss of an example."""
KTO_TYPES.enter("kto", KTOType(saturating, kl_estimate, "mismatched"))
KTO_TYPES.enter("apo_zero_unpaired", KTOType(saturating, nothing, None))  # arXiv 2408.06266, Eq. 7 unpaired
KTO_TYPES.enter("bco", KTOType(logistic, running_mean, "own"))  # arXiv 2404.04656


@register("kto")
@dataclass(frozen=True, kw_only=True)
class KTOLoss(Loss):
    """L = sum of w(label) value(+-(beta r - shift)) / B, B the examples of the whole step."""

    kind: ClassVar[Kind] = Kind.LABELED
    wants_reference: ClassVar[bool] = True  # type: ignore[misc]
    metric_stats: ClassVar[tuple[str, ...]] = ("entropy",)  # type: ignore[misc]
    option_tables: ClassVar = {"loss_type": KTO_TYPES}

    beta: Positive = 0.1
    """Strength of the pull towards the reference (1 / nats)."""
    loss_type: str = "kto"
    """kto, apo_zero_unpaired, or bco."""
    desirable_weight: NotNegative = 1.0
    """Weight of examples labelled True."""
    undesirable_weight: NotNegative = 1.0
    """Weight of examples labelled False."""
    humanline_clip: tuple[float, float] | None = None
    """Where each token's log-ratio to the reference is clipped, in nats, without gradient beyond (humanline, arXiv
    2509.24207; its authors' code: -1 1.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.humanline_clip)

    @property
    def window_pass(self) -> Literal["own", "mismatched"] | None:
        """For the shift."""
        return KTO_TYPES[self.loss_type].window_pass

    def collect(self, policy: CompletionLogps, ref: CompletionLogps, **others: Any) -> Tensor:
        """[C], log-ratios, of mismatched completions (kto) or of the examples' own (bco; NaN with nothing scored)."""
        r = (self._sums(policy, ref) - ref.sums).detach()
        return r.masked_fill(~policy.completion_mask.any(-1), torch.nan) if self.window_pass == "own" else r

    def advance(self, totals: Totals) -> Mapping[str, float]:
        """bco's running mean, as the sum and number of rewards so far."""
        if self.window_pass != "own":
            return totals.state
        total, count = rewards_so_far(totals, self)
        return {"reward_sum": float(total), "num_examples": float(count)}

    def __call__(self, policy: CompletionLogps, ref: CompletionLogps, label: Tensor, *, totals: Totals) -> LossOutput:
        """policy, ref: [C, T]; label: [C] bool; totals.collected: what `collect` gave of the whole step.

        policy.weights: of each example, the same at all of its tokens; None: 1.

        Raises ValueError or TypeError for shapes and dtypes that do not fit, or where `collected` is missing.
        """
        if label.dtype != policy.completion_mask.dtype or label.shape != policy.sums.shape:
            raise ValueError(f"label must be bool [{len(policy.sums)}], got {label.dtype} {list(label.shape)}")
        sums = self._sums(policy, ref)
        value, shift_of, _ = KTO_TYPES[self.loss_type]
        rewards = self.beta * (sums - ref.sums.detach())
        shift = shift_of(totals, self)  # a scalar, which takes the rewards' dtype, and is moved nowhere
        sign = 2 * label.to(rewards.dtype) - 1
        weight = choose(label, self.desirable_weight, self.undesirable_weight, rewards)
        if policy.weights is not None:
            weight = weight * policy.needed("weights").detach().sum(-1) / policy.lengths.clamp(min=1)
        scored = policy.completion_mask.any(-1)
        losses = weight * value(sign * (rewards - shift))
        metrics = {
            "rewards/chosen": Mean.of(rewards, label & scored),
            "rewards/rejected": Mean.of(rewards, ~label & scored),
            "logps/chosen": Mean.of(policy.sums, label & scored),
            "logps/rejected": Mean.of(policy.sums, ~label & scored),
            **token_metrics(policy),
        }
        if self.loss_type == "kto":
            metrics["kl"] = Mean.of(shift / self.beta, scored.any())
        return LossOutput(divide(losses.where(scored, rewards * 0).sum(), totals.num_sequences), metrics)

    def _sums(self, policy: CompletionLogps, ref: CompletionLogps) -> Tensor:
        """[C], summed log-probs of the policy, with its ratios clipped."""
        policy.check_like(tokens=False, ref=ref)
        return (policy if self.humanline_clip is None else clipped(policy, ref, self.humanline_clip)).sums
