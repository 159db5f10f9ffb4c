"""Contrastive Preference Optimization (Xu et al., arXiv 2401.08417) and its kin: pairs without a reference model.

With s a completion's log-probability (its sum over tokens, or its average where the variant says so):

    L = sum over pairs of l(s_w, s_l) / P + weight * NLL,   NLL = the token mean over the step

CPO's NLL is that of the chosen completion, TPO's that of a third, gold one. A variant is one function, entered in
`CPO_TYPES` or `TPO_TYPES`.

Differs from TRL 1.16: (1) the NLL is the token mean of the optimizer step, TRL's of the micro-batch; (2) `alpha` is
computed with expm1 and stops at exponents of 40, where TRL overflows to NaN; an empty completion has average 0, in TRL
0/0; (3) an option that the loss_type does not read is refused: TRL ignores it, with a warning for label_smoothing.
As in TRL, `simpo` keeps the NLL unless cpo_alpha is 0 (the paper has none), and `alphapo` is `simpo` without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .divergences import MAX_EXPONENT
from .dpo_types.labels import smoothed
from .options import NotNegative, Positive, Share, Variants
from .registry import register
from .token_metrics import TOKEN_METRICS, preference_metrics, token_metrics
from .types import CompletionLogps, Kind, Loss, LossOutput, Mean, PairLogps, Totals, divide


class CPOType(NamedTuple):
    """formula(s_w [P], s_l [P], loss) -> [P]. averages: s is the average over tokens. nll: cpo_alpha's default."""

    formula: Callable[[Tensor, Tensor, Any], Tensor]
    averages: bool
    nll: float = 1.0


def sigmoid(chosen: Tensor, rejected: Tensor, loss: Any) -> Tensor:
    """(1 - e) sp(-x) + e sp(x), x = beta (s_w - s_l), arXiv 2401.08417 Eq. 3 with smoothed labels."""
    return smoothed(loss.beta * (chosen - rejected), loss.label_smoothing)


def hinge(chosen: Tensor, rejected: Tensor, loss: Any) -> Tensor:
    """max(0, 1 - beta (s_w - s_l)), SLiC-HF, arXiv 2305.10425."""
    return (1 - loss.beta * (chosen - rejected)).relu()


def ipo(chosen: Tensor, rejected: Tensor, loss: Any) -> Tensor:
    """(s_w - s_l - 1/(2 beta))^2, arXiv 2310.12036 Eq. 17 without a reference."""
    return (chosen - rejected - 1 / (2 * loss.beta)) ** 2


def simpo(chosen: Tensor, rejected: Tensor, loss: Any) -> Tensor:
    """sp(-(beta (s_w - s_l) - gamma)), arXiv 2405.14734; AlphaPO (2501.03884) where `alpha` is not 0."""
    return smoothed(loss.beta * (chosen - rejected) - loss.simpo_gamma, loss.label_smoothing)


def simper(chosen: Tensor, rejected: Tensor, loss: Any) -> Tensor:
    """-exp(s_w) + exp(s_l), inverse perplexities, arXiv 2502.00883: no beta, no reference."""
    return rejected.exp() - chosen.exp()


def tpo_l(chosen: Tensor, rejected: Tensor, loss: Any) -> Tensor:
    """sp(-(beta (s_w - s_l) - gamma)), the length-normalised TPO, arXiv 2405.16681."""
    return smoothed(loss.beta * (chosen - rejected) - loss.tpo_l_gamma, loss.label_smoothing)


CPO_TYPES: Variants[CPOType] = Variants()
TPO_TYPES: Variants[CPOType] = Variants()
for _types in (CPO_TYPES, TPO_TYPES):
    _types.enter("sigmoid", CPOType(sigmoid, averages=False), reads=("label_smoothing",))
    _types.enter("hinge", CPOType(hinge, averages=False))
    _types.enter("ipo", CPOType(ipo, averages=True))
CPO_TYPES.enter("simpo", CPOType(simpo, averages=True), reads=("label_smoothing", "simpo_gamma"))
CPO_TYPES.enter("alphapo", CPOType(simpo, averages=True, nll=0.0), reads=("label_smoothing", "simpo_gamma"))
CPO_TYPES.enter("simper", CPOType(simper, averages=True, nll=0.0), ignores=("beta",))
TPO_TYPES.enter("tpo-l", CPOType(tpo_l, averages=True), reads=("label_smoothing", "tpo_l_gamma"))


def _scores(kind: CPOType, policy: PairLogps, alpha: float = 0.0) -> tuple[Tensor, Tensor]:
    """s_w, s_l [P]; (1 - P^-alpha) / alpha in their place where `alpha` is not 0, whose limit there is log P."""

    def score(completion: CompletionLogps) -> Tensor:
        s = completion.averages if kind.averages else completion.sums
        return -torch.expm1((-alpha * s).clamp(max=MAX_EXPONENT)) / alpha if alpha else s

    return score(policy.chosen), score(policy.rejected)


def _pair_loss(kind: CPOType, scores: tuple[Tensor, Tensor], policy: PairLogps, loss: Any) -> Tensor:
    """The sum over pairs of l(s_w, s_l), scalar; pairs with nothing scored have none."""
    chosen, rejected = scores
    return (kind.formula(chosen, rejected, loss) * policy.scored).sum()


@register("cpo")
@dataclass(frozen=True, kw_only=True)
class CPOLoss(Loss):
    """L = sum over pairs of l(s_w, s_l) / P + cpo_alpha * NLL(chosen); P pairs and NLL tokens of the whole step."""

    kind: ClassVar[Kind] = Kind.PAIRED
    option_tables: ClassVar = {"loss_type": CPO_TYPES}

    beta: Positive = 0.1
    """Steepness in s_w - s_l (1 / nats)."""
    loss_type: str = "sigmoid"
    """sigmoid, hinge, ipo, simpo, alphapo, or simper."""
    label_smoothing: Share = 0.0
    """Probability that a label is flipped."""
    cpo_alpha: NotNegative | None = None
    """Weight of the chosen completion's NLL (default: 1, as in TRL, for simpo too, whose paper has none: give 0; 0 for
    alphapo and simper)."""
    simpo_gamma: float = 0.5
    """Margin to reach, in units of beta s."""
    alpha: float = 0.0
    """Reward (1 - P^-alpha) / alpha in place of log P, for every loss_type, as in TRL (AlphaPO: 0.25); 0 is log P."""

    def __call__(self, policy: PairLogps, *, totals: Totals) -> LossOutput:
        """policy: chosen and rejected [P, T] each. Raises ValueError or TypeError for what does not fit."""
        kind = CPO_TYPES[self.loss_type]
        weight = kind.nll if self.cpo_alpha is None else self.cpo_alpha
        chosen, rejected = scores = _scores(kind, policy, self.alpha)
        nll = -policy.chosen.sums.sum()
        loss = divide(_pair_loss(kind, scores, policy, self), totals.num_sequences)
        metrics = preference_metrics(self.beta * chosen, self.beta * rejected, policy)
        metrics["nll_loss"] = Mean(nll.detach(), policy.chosen.completion_mask.sum())
        return LossOutput(loss + weight * divide(nll, totals.num_chosen_tokens), metrics)


@register("tpo")
@dataclass(frozen=True, kw_only=True)
class TPOLoss(Loss):
    """Triple Preference Optimization (arXiv 2405.16681 Sec. 3): L = sum of l(s_w, s_l) / P + tpo_alpha * NLL(gold)."""

    kind: ClassVar[Kind] = Kind.PAIRED
    metric_stats: ClassVar[tuple[str, ...]] = TOKEN_METRICS  # type: ignore[misc]
    option_tables: ClassVar = {"loss_type": TPO_TYPES}

    beta: Positive = 0.01
    """Steepness in s_w - s_l (1 / nats)."""
    loss_type: str = "sigmoid"
    """sigmoid, hinge, ipo, or tpo-l."""
    label_smoothing: Share = 0.0
    """Probability that a label is flipped."""
    tpo_alpha: NotNegative = 1.0
    """Weight of the gold completion's NLL; at 0 no gold completion is needed."""
    tpo_l_gamma: float = 0.5
    """Margin to reach, in units of beta s."""

    @property
    def scores_gold(self) -> bool:
        """Unless its NLL has no weight."""
        return self.tpo_alpha != 0

    def __call__(self, policy: PairLogps, *, totals: Totals) -> LossOutput:
        """policy: chosen, rejected and gold [P, T] each. Raises ValueError or TypeError for what does not fit."""
        kind = TPO_TYPES[self.loss_type]
        chosen, rejected = scores = _scores(kind, policy)
        loss = divide(_pair_loss(kind, scores, policy, self), totals.num_sequences)
        metrics = preference_metrics(self.beta * chosen, self.beta * rejected, policy)
        if self.scores_gold:
            if policy.gold is None:
                raise ValueError(f"tpo_alpha={self.tpo_alpha} needs the gold completions, policy.gold is None")
            nll = -policy.gold.sums.sum()
            loss = loss + self.tpo_alpha * divide(nll, totals.num_gold_tokens)
            metrics["nll_loss"] = Mean(nll.detach(), policy.gold.completion_mask.sum())
        metrics |= token_metrics(policy.chosen, policy.rejected, policy.gold, predicted=policy.chosen)
        return LossOutput(loss, metrics)
