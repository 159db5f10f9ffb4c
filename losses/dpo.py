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
request 1265), `ipo_sum` does not; (6) `beta_dpo`'s running mean takes a step's margins in after that step, its authors'
code before it; (7) `ld_alpha` weighs the reference's tokens too, as in TRL (LLaMA-Factory's weighs the policy's only);
(8) `sppo_hard` and `sppo` are sums of two squares, as TRL's, their authors' code takes half: loss_weights of 0.5;
(9) `alpha_dpo` takes mean and deviation of the step, its authors' code running ones; (10) `dr_dpo`'s mean is over the
step, its authors' over the micro-batch; (11) `dpo_shift` has its constant lambda, not the schedules; (12) `sba` does
not clip R, as its authors do from below, between 0.003 and 0.025; (13) `down_sample` takes the same tokens each time,
of policy and reference, its authors' code draws them anew and apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .divergences import F_DIVERGENCES
from .dpo_types.base import DPO_TYPES, PairRatios, dpo_type
from .options import NotNegative, Positive, Range, Share
from .registry import register
from .token_metrics import TOKEN_METRICS, preference_metrics, token_metrics
from .token_ratios import check_clip, clipped, down_sampled, mean_entropy, probability, shared_sums
from .types import Kind, Loss, LossOutput, PairLogps, Totals, divide


@dpo_type(divergences=True)
def sigmoid(r: PairRatios, loss: DPOLoss) -> Tensor:
    """-log sigmoid(beta (r_w - r_l)), arXiv 2305.18290 Eq. 7."""
    return -logsigmoid(loss.beta * r.margin)


@dpo_type(divergences=True)
def hinge(r: PairRatios, loss: DPOLoss) -> Tensor:
    """max(0, 1 - beta (r_w - r_l)), the normalised hinge of RSO (arXiv 2309.06657) after SLiC (2305.10425)."""
    return (1 - loss.beta * r.margin).relu()


@dpo_type(divergences=True, averages=True)
def ipo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """(r_w/|y_w| - r_l/|y_l| - 1/(2 beta))^2, arXiv 2310.12036 Eq. 17, averaged over tokens."""
    return (r.average_margin - 1 / (2 * loss.beta)) ** 2


@register("dpo")
@dataclass(frozen=True, kw_only=True)
class DPOLoss(Loss):
    """L = sum over pairs of sum_j c_j l_j(r_w, r_l) / P, P the pairs of the whole step, c the `loss_weights`."""

    kind: ClassVar[Kind] = Kind.PAIRED
    metric_stats: ClassVar[tuple[str, ...]] = TOKEN_METRICS  # type: ignore[misc]
    option_tables: ClassVar = {"loss_type": DPO_TYPES, "f_divergence_type": F_DIVERGENCES}

    beta: Positive = 0.1
    """Strength of the pull towards the reference (1 / nats); tau in ipo."""
    loss_type: tuple[str, ...] = ("sigmoid",)
    """One or several of sigmoid, hinge, ipo, ipo_sum, sigmoid_norm, exo_pair, nca_pair, robust, cdpo, bco_pair,
    sppo_hard, sppo, aot, aot_unpaired, apo_zero, apo_down, discopop, sft, irpo, dpop, cal_dpo, r_dpo, chi_po, rainbow,
    beta_dpo, alpha_dpo, dr_dpo, odpo, modpo, cauchy, focal_po, h_dpo, dpo_shift, bpo, minor_dpo, c2_dpo, sba,
    mallows."""
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
    down_sample: bool = False
    """Sum only as many of the longer completion's tokens as the shorter has, at even distances (SamPO, arXiv 2406.10957
    Eq. 10)."""
    use_weighting: bool = False
    """Multiply each pair by how probable both its completions are (WPO, arXiv 2406.11827 Eq. 2)."""
    reference_free: bool = False
    """Compare with no reference, whose log-probs count as 0 (all answers equally likely)."""
    humanline_clip: tuple[float, float] | None = None
    """Where each token's log-ratio to the reference is clipped, in nats, without gradient beyond (humanline, arXiv
    2509.24207; its authors' code: -1 1.5)."""
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
    alpha_dpo_coef: NotNegative = 0.1
    """How strongly the margin to beat follows a pair's standard score in the step."""
    beta_dpo_coef: NotNegative = 0.6
    """How strongly beta follows the step's mean margin."""
    beta_dpo_momentum: Share = 0.9
    """Of the running mean of margins."""
    dr_dpo_beta: Positive = 1.0
    """Temperature of the mean over pairs: the larger, the nearer to the plain mean."""
    odpo_alpha: NotNegative = 1.0
    """Weight of the pairs' margins."""
    modpo_weight: Annotated[float, Range(0, 1, above=True)] = 0.5
    """Weight of the objective that chosen and rejected are labelled by; the margins have the rest."""
    rejected_weight: Share = 0.95
    """Weight of the rejected log-ratio: lambda of dpo_shift, alpha of bpo (its authors' code: 0.3)."""
    h_dpo_alpha: Positive = 0.95
    """Weight of the policy's entropy; below 1 it becomes sharper than by DPO."""
    focal_po_gamma: NotNegative = 0.05
    """How much less a pair weighs that is ranked wrongly."""
    c2_dpo_lambda: NotNegative = 2e-4
    """Weight of the square of what both log-ratios add up to."""
    sba_lambda: Annotated[float, Range(-1, 3, above=True)] = -0.5
    """The larger, the more pairs weigh that are far from the reference."""
    mallows_phi: Positive = 0.29
    """Weight of the dispersion, so chosen that it changes beta little in the mean."""
    mallows_max_entropy: Positive = math.log(128256)
    """The entropy of blind guessing in nats, log V of a vocabulary of V words (the default: Llama 3's)."""

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
        if self.use_weighting and (apart := [name for name in self.loss_type if not DPO_TYPES[name].pairwise]):
            raise ValueError(f"use_weighting weighs pairs, which {apart[0]} takes apart; leave one of them out")
        if self.down_sample and (means := [name for name in self.loss_type if DPO_TYPES[name].averages]):
            raise ValueError(f"down_sample samples the tokens that {means[0]} averages; leave one of them out")
        if self.down_sample and self.ld_alpha is not None:
            raise ValueError("down_sample and ld_alpha both shorten the longer completion; leave one of them out")
        check_clip(self.humanline_clip)
        if self.humanline_clip is not None and self.reference_free:
            raise ValueError("humanline_clip clips what reference_free leaves out; leave one of them out")
        if self.reference_free and (readers := [name for name in self.loss_type if DPO_TYPES[name].ref_entropy]):
            raise ValueError(f"{readers[0]} reads the entropy of what reference_free leaves out; leave one of them out")
        if "exo_pair" in self.loss_type and not 0 < self.label_smoothing < 1:
            raise ValueError(f"exo_pair needs label_smoothing above 0 (1e-3, say), got {self.label_smoothing}")
        if "robust" in self.loss_type and self.label_smoothing >= 0.5:
            raise ValueError(f"robust needs label_smoothing below 0.5, got {self.label_smoothing}")

    @property
    def wants_reference(self) -> bool:
        """Unless it is `reference_free`."""
        return not self.reference_free

    @property
    def wants_margin(self) -> bool:
        """For odpo, modpo and sppo."""
        return any(DPO_TYPES[name].margin for name in self.loss_type)

    @property
    def stats(self) -> tuple[str, ...]:
        """log sum p^2, for WPO."""
        return ("log_sum_p2",) if self.use_weighting else ()

    @property
    def ref_stats(self) -> tuple[str, ...]:
        """The reference's entropy, for what reads it (mallows)."""
        return ("entropy",) if any(DPO_TYPES[name].ref_entropy for name in self.loss_type) else ()

    @property
    def window_pass(self) -> Literal["own"] | None:
        """For what compares a pair with the other pairs of the step."""
        return "own" if any(DPO_TYPES[name].whole_step for name in self.loss_type) else None

    def collect(self, policy: PairLogps, ref: PairLogps | None = None) -> Tensor:
        """[P, 5]: margins of policy and reference, r_w, r_l, r_w/|y_w| - r_l/|y_l|; NaN where nothing is scored."""
        r = self._ratios(policy, ref, Totals(num_sequences=0, num_tokens=0))
        margin, ref_margin = r.chosen_logps - r.rejected_logps, r.ref_chosen_logps - r.ref_rejected_logps
        values = torch.stack([margin, ref_margin, r.chosen, r.rejected, r.average_margin], -1).detach()
        return values.masked_fill(~policy.scored[:, None], math.nan)

    def advance(self, totals: Totals) -> Mapping[str, float]:
        """beta_dpo's running mean of margins."""
        if "beta_dpo" not in self.loss_type or totals.collected is None:
            return totals.state
        mean = float((totals.collected[:, 2] - totals.collected[:, 3]).nanmean().nan_to_num())
        kept = self.beta_dpo_momentum
        return {"margin": kept * totals.state.get("margin", 0.0) + (1 - kept) * mean}

    def __call__(self, policy: PairLogps, ref: PairLogps | None = None, *, totals: Totals) -> LossOutput:
        """policy, ref: chosen and rejected [P, T] each. `ref` gets no gradient; None where it is `reference_free`.

        Raises ValueError or TypeError for shapes and dtypes that do not fit, or where a statistic is missing.
        """
        if self.wants_margin and policy.margin is None:
            raise ValueError(f"loss_type {', '.join(self.loss_type)} needs the pairs' margins, policy.margin is None")
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

    def _ratios(self, policy: PairLogps, ref: PairLogps | None, totals: Totals) -> PairRatios:
        own, base = [policy.chosen, policy.rejected], None if ref is None else [ref.chosen, ref.rejected]
        if self.down_sample:
            own, base = down_sampled(own), None if base is None else down_sampled(base)
        if self.reference_free:
            ref_chosen, ref_rejected = (torch.zeros_like(x.sums) for x in own)
        elif base is None:
            raise ValueError("DPO compares with the reference's log-probs: `ref` is None, which needs reference_free")
        else:
            policy.chosen.check_like(tokens=False, ref=base[0])
            ref_chosen, ref_rejected = (sums.detach() for sums in shared_sums(base, self.ld_alpha))
            if self.humanline_clip is not None:
                own = [clipped(*sides, self.humanline_clip) for sides in zip(own, base, strict=True)]
        chosen, rejected = shared_sums(own, self.ld_alpha)
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
            None if policy.margin is None else policy.margin.to(chosen).detach(),
            mean_entropy([ref.chosen, ref.rejected]) if ref is not None and self.ref_stats else None,
            totals,
        )
