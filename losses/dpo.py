"""Direct Preference Optimization (Rafailov et al., arXiv 2305.18290) and its variants.

With r_w, r_l the log-ratios of chosen and rejected to the reference, summed over completion tokens (EOS included), a
variant is one function of them: `PairRatios, DPOLoss -> loss of each pair`. To add one:

    @dpo_type()
    def my_loss(r: PairRatios, loss: DPOLoss) -> Tensor:
        return ...

and it is trained by `--loss_type my_loss`, and held to the laws and to its oracle by the tests. The others are in
`dpo_types/`.

Differs from TRL 1.16: (1) means, sorted orders and token counts are those of the optimizer step, not of the
micro-batch; (2) `ipo` and `sigmoid_norm` divide by scored tokens, TRL by the unshifted mask: the same number wherever
there is a prompt; (3) exponents stop at 40 (`alpha_divergence`: TRL at 80, elsewhere nowhere: it overflows to NaN);
(4) an option that no chosen loss_type reads is refused, TRL ignores it: its `sigmoid` with label_smoothing is plain DPO
(the smoothed loss is `cdpo`).
Differs from the papers or their authors' code: (5) `ipo` averages over tokens, as its authors recommended to TRL (pull
request 1265); (6) `beta_dpo`'s running mean takes a step's margins in after that step, its authors' code before it;
(7) `ld_alpha` weighs the reference's tokens too, as in TRL (LLaMA-Factory's weighs the policy's only); (8) `sppo_hard`
is the sum of its two squares, as in TRL, its authors' code takes half of it: loss_weights of 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .options import NotNegative, Positive, Share, Variants, variant
from .registry import register
from .token_metrics import TOKEN_METRICS, preference_metrics, token_metrics
from .types import CompletionLogps, Kind, Loss, LossOutput, PairLogps, Totals, divide

MAX_EXPONENT = 40.0
"""exp(40) squared is still finite in float32."""


class PairRatios(NamedTuple):
    """What a variant sees of P pairs, [P] each, in nats; only the policy's own log-probs carry a graph.

    chosen, rejected: log-ratios r summed over tokens, or f'(exp r) where an f-divergence is chosen.
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: the summed log-probs behind them.
    chosen_nll: -log p summed over the chosen tokens, whatever `ld_alpha` is.
    chosen_lengths, rejected_lengths: scored tokens, at least 1.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_nll: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    totals: Totals

    @property
    def margin(self) -> Tensor:
        """[P], r_w - r_l"""
        return self.chosen - self.rejected

    @property
    def average_margin(self) -> Tensor:
        """[P], r_w / |y_w| - r_l / |y_l|"""
        return self.chosen / self.chosen_lengths - self.rejected / self.rejected_lengths


class DPOType(NamedTuple):
    """divergences: other f-divergences fit the formula. whole_step: it needs `collected` of the whole step."""

    formula: Callable[[PairRatios, DPOLoss], Tensor]
    divergences: bool
    whole_step: bool


DPO_TYPES: Variants[DPOType] = Variants()
"""loss_type -> the loss of each pair, [P], nats."""

Formula = Callable[[PairRatios, "DPOLoss"], Tensor]


def dpo_type(
    *,
    divergences: bool = False,
    whole_step: bool = False,
    reads: Collection[str] = (),
    ignores: Collection[str] = (),
) -> Callable[[Formula], Formula]:
    """Function decorator: enter a formula into `DPO_TYPES` under its own name; see `DPOType` and `Variants.enter`."""

    def add(formula: Formula) -> Formula:
        own = ["f_divergence_type"] if divergences and "f_divergence_type" not in ignores else []
        entry = DPOType(formula, divergences, whole_step)
        DPO_TYPES.enter(formula.__name__, entry, reads=[*reads, *own], ignores=ignores)
        return formula

    return add


@dpo_type(divergences=True)
def sigmoid(r: PairRatios, loss: DPOLoss) -> Tensor:
    """-log sigmoid(beta (r_w - r_l)), arXiv 2305.18290 Eq. 7."""
    return -logsigmoid(loss.beta * r.margin)


@dpo_type(divergences=True)
def hinge(r: PairRatios, loss: DPOLoss) -> Tensor:
    """max(0, 1 - beta (r_w - r_l)), the normalised hinge of RSO (arXiv 2309.06657) after SLiC (2305.10425)."""
    return (1 - loss.beta * r.margin).relu()


@dpo_type(divergences=True)
def ipo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """(r_w/|y_w| - r_l/|y_l| - 1/(2 beta))^2, arXiv 2310.12036 Eq. 17, averaged over tokens."""
    return (r.average_margin - 1 / (2 * loss.beta)) ** 2


F_DIVERGENCES: Variants[Callable[[Tensor, DPOLoss], Tensor]] = Variants()
"""f_divergence_type -> f'(u) of r = log u, [P]: what takes the place of r (arXiv 2309.16240)."""


@variant(F_DIVERGENCES)
def reverse_kl(r: Tensor, loss: DPOLoss) -> Tensor:
    """log u"""
    return r


@variant(F_DIVERGENCES)
def forward_kl(r: Tensor, loss: DPOLoss) -> Tensor:
    """1 - 1/u"""
    return -torch.expm1((-r).clamp(max=MAX_EXPONENT))


@variant(F_DIVERGENCES)
def js_divergence(r: Tensor, loss: DPOLoss) -> Tensor:
    """log(2 u / (1 + u)); its slope at the reference, and so the gradient, is half of reverse_kl's."""
    return math.log(2) + logsigmoid(r)


@variant(F_DIVERGENCES, reads=("f_alpha_divergence_coef",))
def alpha_divergence(r: Tensor, loss: DPOLoss) -> Tensor:
    """(u^(a-1) - 1) / (a - 1), reverse_kl at a = 1; a is 1 - alpha of the paper, as in TRL."""
    power = loss.f_alpha_divergence_coef - 1
    return torch.expm1((power * r).clamp(max=MAX_EXPONENT)) / power if power else r


@register("dpo")
@dataclass(frozen=True, kw_only=True)
class DPOLoss(Loss):
    """L = sum over pairs of sum_j c_j l_j(r_w, r_l) / P, P the pairs of the whole step, c the `loss_weights`."""

    kind: ClassVar[Kind] = Kind.PAIRED
    wants_reference: ClassVar[bool] = True  # type: ignore[misc]
    metric_stats: ClassVar[tuple[str, ...]] = TOKEN_METRICS  # type: ignore[misc]
    option_tables: ClassVar = {"loss_type": DPO_TYPES, "f_divergence_type": F_DIVERGENCES}

    beta: Positive = 0.1
    """Strength of the pull towards the reference (1 / nats); tau in ipo."""
    loss_type: tuple[str, ...] = ("sigmoid",)
    """One or several of sigmoid, hinge, ipo, sigmoid_norm, exo_pair, nca_pair, robust, cdpo, bco_pair, sppo_hard, aot,
    aot_unpaired, apo_zero, apo_down, discopop, sft, irpo, dpop, cal_dpo, r_dpo, chi_po, rainbow, beta_dpo."""
    loss_weights: tuple[float, ...] | None = None
    """Weight of each loss_type (default: 1)."""
    label_smoothing: Share = 0.0
    """Probability that a label is flipped."""
    f_divergence_type: str = "reverse_kl"
    """reverse_kl, forward_kl, js_divergence, or alpha_divergence."""
    f_alpha_divergence_coef: float = 0.5
    """The exponent plus 1."""
    ld_alpha: Share | None = None
    """Weight of the tokens beyond the shorter completion's length (LD-DPO, arXiv 2409.06411)."""
    use_weighting: bool = False
    """Multiply each pair by how probable both its completions are (WPO, arXiv 2406.11827 Eq. 2)."""
    discopop_tau: Positive = 0.05
    """Temperature of the blend."""
    irpo_alpha: NotNegative = 1.0
    """Weight of the NLL."""
    dpop_lambda: NotNegative = 50.0
    """Penalty on a chosen completion that has lost probability."""
    cal_dpo_coef: NotNegative = 0.5
    """Weight of the calibration."""
    r_dpo_alpha: float = 0.1
    """Price of a token, in nats."""
    chi_po_r_max: Positive = 10.0
    """Margins are clipped to twice this."""
    rainbow_mu: Share = 0.25
    """Share of the reference in the margin to beat."""
    rainbow_gamma: float = 0.1
    """The constant margin, in nats a token."""
    beta_dpo_coef: NotNegative = 0.6
    """How strongly beta follows the step's mean margin."""
    beta_dpo_momentum: Share = 0.9
    """Of the running mean of margins."""

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            object.__setattr__(self, "loss_type", (self.loss_type,))
        if not self.loss_type:
            raise ValueError("loss_type must name at least one variant")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"loss_weights={self.loss_weights} must have one number for each of {self.loss_type}")
        super().__post_init__()
        unfit = [name for name in self.loss_type if not DPO_TYPES[name].divergences]
        if unfit and self.f_divergence_type != "reverse_kl":
            raise ValueError(f"f_divergence_type={self.f_divergence_type!r} is not defined for {', '.join(unfit)}")
        if self.use_weighting and {"aot", "aot_unpaired"} & set(self.loss_type):
            raise ValueError("use_weighting weighs pairs, which aot and aot_unpaired take apart; leave one of them out")
        if "exo_pair" in self.loss_type and not 0 < self.label_smoothing < 1:
            raise ValueError(f"exo_pair needs label_smoothing above 0 (1e-3, say), got {self.label_smoothing}")
        if "robust" in self.loss_type and self.label_smoothing >= 0.5:
            raise ValueError(f"robust needs label_smoothing below 0.5, got {self.label_smoothing}")

    @property
    def stats(self) -> tuple[str, ...]:
        """log sum p^2, for WPO."""
        return ("log_sum_p2",) if self.use_weighting else ()

    @property
    def window_pass(self) -> Literal["own"] | None:
        """For what compares a pair with the other pairs of the step."""
        return "own" if any(DPO_TYPES[name].whole_step for name in self.loss_type) else None

    def collect(self, policy: PairLogps, ref: PairLogps) -> Tensor:  # type: ignore[override]
        """[P, 4]: margin of the policy, margin of the reference, r_w, r_l; NaN for a pair with nothing scored."""
        r = self._ratios(policy, ref, Totals(num_sequences=0, num_tokens=0))
        margin, ref_margin = r.chosen_logps - r.rejected_logps, r.ref_chosen_logps - r.ref_rejected_logps
        values = torch.stack([margin, ref_margin, r.chosen, r.rejected], -1).detach()
        return values.masked_fill(~policy.scored[:, None], math.nan)

    def advance(self, totals: Totals) -> Mapping[str, float]:
        """beta_dpo's running mean of margins."""
        if "beta_dpo" not in self.loss_type or totals.collected is None:
            return totals.state
        mean = float((totals.collected[:, 2] - totals.collected[:, 3]).nanmean().nan_to_num())
        kept = self.beta_dpo_momentum
        return {"margin": kept * totals.state.get("margin", 0.0) + (1 - kept) * mean}

    def __call__(self, policy: PairLogps, ref: PairLogps, *, totals: Totals) -> LossOutput:
        """policy, ref: chosen and rejected [P, T] each. `ref` gets no gradient.

        Raises ValueError or TypeError for shapes and dtypes that do not fit, or where a statistic is missing.
        """
        r = self._ratios(policy, ref, totals)
        scored = policy.scored  # a pair with both sides wholly masked has nothing to say, and no loss
        weights = self.loss_weights or (1.0,) * len(self.loss_type)
        parts = [w * DPO_TYPES[name].formula(r, self) for name, w in zip(self.loss_type, weights, strict=True)]
        per_pair_loss = torch.stack(parts).sum(0)
        if self.use_weighting:
            per_pair_loss = per_pair_loss * probability(policy.chosen) * probability(policy.rejected)
        per_pair_loss = per_pair_loss.where(scored, r.margin * 0)
        metrics = preference_metrics(
            self.beta * (r.chosen_logps - r.ref_chosen_logps),
            self.beta * (r.rejected_logps - r.ref_rejected_logps),
            policy,
        )
        metrics |= token_metrics(policy.chosen, policy.rejected, predicted=policy.chosen)
        return LossOutput(divide(per_pair_loss.sum(), totals.num_sequences), metrics)

    def _ratios(self, policy: PairLogps, ref: PairLogps, totals: Totals) -> PairRatios:
        policy.chosen.check_like(tokens=False, ref=ref.chosen)
        chosen, rejected = self._sums(policy)
        ref_chosen, ref_rejected = (sums.detach() for sums in self._sums(ref))
        score = F_DIVERGENCES[self.f_divergence_type]
        return PairRatios(
            score(chosen - ref_chosen, self),
            score(rejected - ref_rejected, self),
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            -policy.chosen.sums,
            policy.chosen.lengths.clamp(min=1),
            policy.rejected.lengths.clamp(min=1),
            totals,
        )

    def _sums(self, pairs: PairLogps) -> list[Tensor]:
        """[P] each, summed log-probs of chosen and rejected; `ld_alpha` weighs what is longer than the other side."""
        if self.ld_alpha is None:
            return [pairs.chosen.sums, pairs.rejected.sums]
        shared = torch.minimum(pairs.chosen.lengths, pairs.rejected.lengths)[:, None]
        return [
            torch.where(x.completion_mask.cumsum(-1) > shared, self.ld_alpha * x.logps, x.logps).sum(-1)
            for x in (pairs.chosen, pairs.rejected)
        ]


def probability(completion: CompletionLogps) -> Tensor:
    """[P] without gradient, exp of the mean over tokens of log p - log sum_v p_v^2: WPO, arXiv 2406.11827 Eq. 2.

    Not capped at 1, as in TRL (the authors' code caps the product of the two).
    """
    aligned = completion.logps - completion.needed("log_sum_p2")
    return (aligned.sum(-1) / completion.lengths.clamp(min=1)).detach().exp()
