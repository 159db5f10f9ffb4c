"""Group Relative Policy Optimization (Shao et al., arXiv 2402.03300) and its variants.

With rho = exp(log p - log p_old) of each token (or, at sequence level, of the mean over the sequence,
arXiv 2507.18071), A the advantage of the completion and d = log p - log p_ref:

    token loss = -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta k(d)
    L = sum over tokens of weight * token loss - entropy_coef * token mean of the entropy
        - positive_nll_coef * mean of log p over the tokens of A > 0

Four parts can be chosen apart: the surrogate (the first term, `loss_type`), the weight (`loss_aggregation`; without it
the one of the loss_type's paper), what rho is of (`importance_sampling_level`), and the advantage, of completions or of
tokens. They are small functions in `grpo_types/`. k is one of `KL_ESTIMATORS`.

Differs from TRL 1.16: (1) token totals, the mean entropy and the entropy's quantile are those of the optimizer step.
TRL's dapo divides by the tokens of the generation batch, which is the same where a generation batch is one step; its
bnpo divides by the tokens of a micro-batch, which would make the result depend on the memory setting: here bnpo's
batch is the step, so it equals dapo. (2) log-ratios above 40 are held there, where TRL overflows to NaN at 88.
(3) the entropy's quantile comes from a forward pass of its own before the step's. (4) `cispo` caps the ratio at
epsilon_high itself, as in TRL, but by default at 5 (ScaleRL, arXiv 2510.13786), TRL's at epsilon's 0.2, which binds
for nearly every token. (5) cispo's share of capped tokens with A > 0 is `clip_ratio/high_mean`, TRL's
`cispo_clip_ratio`; it has no lower bound, and sapo and vespo, which clip nothing, have no such metrics, as in TRL.
(6) an option that the loss_type does not read is refused; TRL ignores it, but for vespo at sequence level, where its
KL term is corrected by the sequence's ratio. (7) what was sampled by another policy, `behavior`, is not corrected for
by default (`sampling_correction` in `grpo_sampling.py`, TRL's `vllm_importance_sampling_*`); TRL takes sequence_mask
with vLLM. (8) a token without the sampler's log-prob (NaN) makes a corrected loss NaN, which a step refuses; TRL takes
its ratio for 1. (9) a correction's range must hold 1, the ratio on policy.
Differs from verl: (10) a completion with nothing scored counts in B, as in TRL, also in means over sequences.
As in TRL, the KL estimate is multiplied by rho by default (`use_bias_correction_kl`, arXiv 2512.02556), so that k3's
gradient is that of the reverse KL also off policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .grpo_sampling import SAMPLING_CORRECTIONS, check_correction, correct, log_sampled
from .grpo_types import GRPO_TYPES, KL_ESTIMATORS, LEVELS, LOSS_AGGREGATIONS, Ratios
from .grpo_types.baseline import baseline_terms
from .grpo_types.chosen import clip_metrics, positive_nll, top_entropy
from .grpo_types.inputs import (
    beside_others,
    check_compared,
    check_inputs,
    check_meaning,
    compared_by,
    ratios_of,
)
from .options import Count, NotNegative, Positive, Share
from .registry import register
from .types import CompletionLogps, Kind, Loss, LossOutput, Mean, Totals


@register("grpo")
@dataclass(frozen=True, kw_only=True)
class GRPOLoss(Loss):
    """L = sum_i w_i sum_t l_it, with the weights w_i of the `loss_type`; see the module for l."""

    kind: ClassVar[Kind] = Kind.GROUPED
    option_tables: ClassVar = {
        "loss_type": GRPO_TYPES,
        "loss_aggregation": LOSS_AGGREGATIONS,
        "kl_estimator": KL_ESTIMATORS,
        "importance_sampling_level": LEVELS,
        "sampling_correction": SAMPLING_CORRECTIONS,
    }
    option_switches: ClassVar = {"kl_estimator": "beta", "use_bias_correction_kl": "beta"}

    loss_type: str = "dapo"
    """dapo, grpo, dr_grpo, bnpo, luspo, cispo, sapo, vespo, gmpo, rloo, reinforce, topr, kimi, cfpo, pspo, prime, fipo,
    a2po, m2po, clip_cov, kl_cov, real, or target_po."""
    loss_aggregation: str | None = None
    """token_mean, sequence_mean, sequence_sum, constant_length (of max_completion_length), or prompt_mean (default: the
    loss_type's own)."""
    beta: NotNegative = 0.0
    """Weight of the KL term to the reference; 0 needs no reference."""
    kl_estimator: str = "k3"
    """k1, k2, k3, k3+ (the value of k3, the gradient of k2), or abs."""
    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the importance ratio."""
    epsilon: NotNegative | None = None
    """Clip range below 1 (default: 0.2); gmpo: below 0, of the log-ratio (default: 0.4); cispo: what the weight is at
    least below 1 (default: no bound); cfpo: where the penalty stops the ratio, on either side."""
    epsilon_high: NotNegative | None = None
    """Clip range above 1 (default: epsilon); cispo: the cap of the ratio itself (default: 5, as ScaleRL has it)."""
    delta: Positive | None = None
    """Cap of the unclipped ratio (INTELLECT-2); from 1 + epsilon_high on it is PPO's dual clip."""
    importance_sampling_level: str = "token"
    """token, sequence (GSPO, and LUSPO as its paper has it: luspo too is token-level unless asked), or sequence_token
    (GSPO-token: the sequence's ratio, the gradient of each token)."""
    off_policy_mask_threshold: float | None = None
    """Drop completions of negative advantage whose mean log(p_old / p) is above this (DeepSeek-V3.2)."""
    sampling_correction: str = "none"
    """Weight for what was sampled otherwise than it is trained, of a token, a sequence or its geometric mean: none,
    token_truncate, token_mask, sequence_truncate, sequence_mask, geometric_truncate, geometric_mask, icepop, decoupled,
    dppo_tv, dppo_kl, or ipo."""
    sampling_clip_min: float | None = None
    """Lower bound of the ratio (default: 0; geometric: 0.99, icepop: 0.5), or of the difference of the probabilities
    (dppo_tv: -0.15, ipo: -0.2), or of minus the divergence (dppo_kl: -0.05)."""
    sampling_clip_max: float | None = None
    """Upper bound (default: 3; geometric: 1.01, icepop: 5, dppo_tv: 0.15, ipo: 0.2, dppo_kl: 0.05)."""
    top_entropy_quantile: Share = 1.0
    """Share of tokens, those of highest entropy over the step, that the policy term is taken of."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    positive_nll_coef: NotNegative = 0.0
    """mu, the weight of -log p in the mean over the step's tokens of positive advantage (VAPO, where it is 0.1)."""
    optimal_token_baseline: bool = False
    """Take off each token's advantage the mean advantage of the prompt's completions that have a token at its place,
    weighted by the variance of their gradients up to there (OTB)."""
    max_completion_length: Count = 512
    """Longest completion generated, in tokens; the divisor of dr_grpo and constant_length."""
    sapo_temperature_pos: Positive = 1.0
    """Steepness of the gate where the advantage is positive."""
    sapo_temperature_neg: Positive = 1.05
    """Steepness elsewhere."""
    log_ratio_coef: NotNegative = 1e-3
    """tau, the weight of the squared log-ratio (kimi: of its half)."""
    pspo_alpha: Share = 0.1
    """Share of the old policy in the ratio."""
    fipo_half_life: Positive = 32.0
    """Tokens after which a later log-ratio counts half."""
    fipo_clip: NotNegative = 0.2
    """How far above 1 a token's weight may go."""
    a2po_beta: Positive = 1e-3
    """beta_2, by which a completion's log-ratio to the reference is multiplied before it is compared with A."""
    m2po_threshold: NotNegative = 0.04
    """What the mean of the squared log-ratios may be, of tokens that the advantage takes further from a ratio of 1."""
    cov_share: Share = 2e-4
    """Share of the step's tokens that are chosen by the covariance of advantage and log-prob, at least one token."""
    clip_cov_low: float = 1.0
    """Covariance above which a token may be chosen."""
    clip_cov_high: float = 5.0
    """Covariance below which it may."""
    kl_cov_coef: NotNegative = 1.0
    """Weight of the penalty |log ratio| of the chosen tokens."""
    real_temperature: Positive = 0.5
    """tau, what a completion's mean log-ratio is divided by."""
    target_po_temperature: Positive = 1.0
    """eta, what the advantage is divided by in the target's exponent."""
    vespo_k_pos: NotNegative = 2.0
    """Power of the ratio where the advantage is not negative."""
    vespo_lambda_pos: NotNegative = 3.0
    """Rate of its exponential damping there."""
    vespo_k_neg: NotNegative = 3.0
    """Power where the advantage is negative."""
    vespo_lambda_neg: NotNegative = 2.0
    """Damping there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_meaning(self)
        check_correction(self, GRPO_TYPES[self.loss_type].corrected)

    @property
    def wants_reference(self) -> bool:
        """For the KL term, and for what regresses on the log-ratio to it."""
        return self.beta > 0 or GRPO_TYPES[self.loss_type].to_reference

    @property
    def wants_behavior(self) -> bool:
        """For the correction, and as metrics."""
        return True

    @property
    def wants_prompt_tokens(self) -> bool:
        """For the mean over prompts."""
        return self.loss_aggregation == "prompt_mean"

    @property
    def wants_prompts(self) -> bool:
        """For what has one term a prompt, or a baseline at each of its tokens."""
        return self.optimal_token_baseline or GRPO_TYPES[self.loss_type].by_prompt

    @property
    def stats(self) -> tuple[str, ...]:
        """The entropy, as a metric too; log sum p^2, for the baseline."""
        return ("entropy", "log_sum_p2") if self.optimal_token_baseline else ("entropy",)

    @property
    def window_pass(self) -> Literal["own"] | None:
        """For the entropy's quantile, and for what compares a token or completion with others of the step."""
        compares = self.optimal_token_baseline or GRPO_TYPES[self.loss_type].collects
        return "own" if self.top_entropy_quantile < 1 or compares else None

    @property
    def epsilons(self) -> tuple[float, float]:
        """How far the ratio may go below and above 1 (gmpo: its logarithm, below and above 0)."""
        kind = GRPO_TYPES[self.loss_type]
        low = kind.epsilon if self.epsilon is None else self.epsilon
        high = kind.epsilon_high if self.epsilon_high is None else self.epsilon_high
        return low, low if high is None else high

    def collect(
        self,
        policy: CompletionLogps,
        ref: CompletionLogps | None = None,
        *,
        advantages: Tensor | None = None,
        old: CompletionLogps | None = None,
        behavior: CompletionLogps | None = None,
        prompts: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """[n, k], what the loss_type `collects` of scored tokens (or of completions), or the baseline's terms; and the
        entropies last.

        Arguments as the loss has them; advantages are needed by what compares them.
        """
        mask, collects, columns = policy.completion_mask, GRPO_TYPES[self.loss_type].collects, []
        if collects is not None or self.optimal_token_baseline:
            if advantages is None:
                raise ValueError(f"{compared_by(self)} collects what it compares: it needs advantages")
            check_inputs(self, policy, advantages, old=old, behavior=behavior, prompts=prompts)
            x = ratios_of(self, policy, old, advantages, prompts=prompts)
            if collects is not None:
                values = collects(x._replace(log_sampled=log_sampled(policy, behavior)), self)
            else:
                values = baseline_terms(policy, x)
            columns.append(values[mask] if values.ndim == 3 else values)
        if self.top_entropy_quantile < 1:
            columns.append(policy.needed("entropy")[mask][:, None])
        return torch.cat(columns, -1).detach()

    def __call__(
        self,
        policy: CompletionLogps,
        ref: CompletionLogps | None = None,
        *,
        advantages: Tensor,
        old: CompletionLogps | None = None,
        behavior: CompletionLogps | None = None,
        prompt_tokens: Tensor | None = None,
        prompts: Tensor | None = None,
        totals: Totals,
    ) -> LossOutput:
        """policy, old, ref, behavior: [C, T]; advantages: [C], or [C, T] where tokens have their own, which are not
        read where masked. Without `old` the batch is on policy (rho = 1). prompt_tokens: [C], scored tokens of all
        completions that the step has of the same prompt, in whichever micro-batch. prompts: [C] int64, the same number
        for those alone, from 0 to 2^43.

        Raises ValueError or TypeError for shapes and dtypes that do not fit, or where an option needs what is missing.
        """
        mask = policy.completion_mask
        of_prompts = {"prompts": prompts, "prompt_tokens": prompt_tokens}
        check_inputs(self, policy, advantages, old=old, behavior=behavior, **of_prompts)
        check_compared(self, policy, ref, totals)
        kind = GRPO_TYPES[self.loss_type]
        kept, num_kept = top_entropy(policy, totals, self.top_entropy_quantile)
        x = ratios_of(self, policy, old, advantages, kept, **of_prompts)
        x = beside_others(self, policy, x, totals.collected, ref)
        metrics = clip_metrics(x, self, mask)
        if behavior is not None:
            weight, seen = correct(self, policy, old, behavior, x.advantages)
            x, metrics = x._replace(weight=weight, log_sampled=log_sampled(policy, behavior)), metrics | seen
        elif self.sampling_correction != "none":
            raise ValueError(
                f"sampling_correction={self.sampling_correction} needs the sampler's log-probs, `behavior`"
            )
        per_token_loss = kind.surrogate(x, self) * self._on_policy(x)
        if x.weight is not None and not kind.weighs:
            per_token_loss = per_token_loss * x.weight
        per_token_loss = per_token_loss.expand(mask.shape)
        if not kind.sequence_term:
            per_token_loss = per_token_loss * kept
        if self.beta > 0:
            assert x.ref_logps is not None
            kl = KL_ESTIMATORS[self.kl_estimator](x.logps - x.ref_logps)
            kl = kl * x.ratio if self.use_bias_correction_kl and not kind.sequence_term else kl
            per_token_loss = per_token_loss + self.beta * kl
            metrics["kl"] = Mean.of(kl, mask)
        weight_of = kind.weight if self.loss_aggregation is None else LOSS_AGGREGATIONS[self.loss_aggregation]
        loss = (weight_of(x, totals, self) * policy.masked(per_token_loss)).sum()
        if policy.entropy is not None:
            metrics["entropy"] = Mean.of(policy.entropy, mask)
        if self.entropy_coef:
            entropy = (policy.needed("entropy") * kept).sum()
            loss = loss - self.entropy_coef * entropy / num_kept
        if self.positive_nll_coef:
            nll, metrics["nll_loss"] = positive_nll(x, mask, totals)
            loss = loss + self.positive_nll_coef * nll
        return LossOutput(loss, metrics)

    def _on_policy(self, x: Ratios) -> Tensor | float:
        """[C, 1], 0 for completions that the off-policy mask drops (arXiv 2512.02556 Eq. 9), else 1; [C, T], of their
        tokens of negative advantage, where tokens have their own."""
        if self.off_policy_mask_threshold is None:
            return 1.0
        log_ratio = x.log_ratio if x.log_sampled is None else x.log_sampled
        drift = -log_ratio.sum(-1, keepdim=True) / x.lengths
        return ((x.advantages >= 0) | (drift <= self.off_policy_mask_threshold)).to(x.ratio.dtype)
