"""Policy gradients on groups of completions: GRPO and what came after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logratio.reference.oracle._math import kl_estimate, zero
from logratio.reference.oracle.grpo_step import PROMPT_TERMS, Chosen, chosen_of, without_baseline
from logratio.reference.oracle.grpo_tokens import gmpo, policy_term, rloo, vespo_weight
from logratio.reference.oracle.sampling import weights


@dataclass(frozen=True)
class Options:
    """The options of `grpo`, with their defaults."""

    loss_type: str = "dapo"
    loss_aggregation: str | None = None
    beta: float = 0.0
    epsilon: float | None = None
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: str = "token"
    use_bias_correction_kl: bool = True
    kl_estimator: str = "k3"
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    entropy_coef: float = 0.0
    positive_nll_coef: float = 0.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    log_ratio_coef: float = 1e-3
    pspo_alpha: float = 0.1
    fipo_half_life: float = 32.0
    fipo_clip: float = 0.2
    m2po_threshold: float = 0.04
    cov_share: float = 2e-4
    clip_cov_low: float = 1.0
    clip_cov_high: float = 5.0
    kl_cov_coef: float = 1.0
    real_temperature: float = 0.5
    target_po_temperature: float = 1.0
    a2po_beta: float = 1e-3
    optimal_token_baseline: bool = False
    max_completion_length: int = 512
    sampling_correction: str = "none"
    sampling_clip_min: float | None = None
    sampling_clip_max: float | None = None

    @property
    def low(self) -> float:
        if self.epsilon is not None:
            return self.epsilon
        return 0.4 if self.loss_type == "gmpo" else 0.2  # arXiv 2507.20673, in log space; 2402.03300

    @property
    def high(self) -> float:
        if self.epsilon_high is not None:
            return self.epsilon_high
        return 5.0 if self.loss_type == "cispo" else self.low  # a cap of the ratio itself: ScaleRL, arXiv 2510.13786


def grpo(
    logps: Sequence[Tensor],
    old_logps: Sequence[Tensor] | None,
    ref_logps: Sequence[Tensor] | None,
    advantages: Sequence[float | Sequence[float]] | Tensor,
    *,
    prompts: Sequence[int] | None = None,
    entropy: Sequence[Tensor] | None = None,
    behavior_logps: Sequence[Tensor] | None = None,
    log_sum_p2: Sequence[Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """The policy term plus beta KL, averaged as `loss_type` says, less entropy_coef times the mean entropy.

    `options` as in `Options`. Without `old_logps` the step is on policy. entropy: of each token's distribution, for
    entropy_coef and top_entropy_quantile. behavior_logps: of the policy that the completions were drawn by, for
    sampling_correction and the off-policy mask, if it is another one. advantages: one a completion, or a list of one a
    token. prompts: which prompt each completion is of, for what is of a prompt. log_sum_p2: log sum_v p_v^2 of each
    token's distribution, for optimal_token_baseline.
    """
    o = Options(**options)
    _refuse_undefined(o, ref_logps, entropy)
    if o.sampling_correction != "none" and behavior_logps is None:
        raise ValueError(f"sampling_correction={o.sampling_correction} needs behavior_logps")
    old_logps = [y.detach() for y in logps] if old_logps is None else [y.detach() for y in old_logps]
    drawn_by = [mu.detach() for mu in (old_logps if behavior_logps is None else behavior_logps)]
    given = [_each(a, len(y)) for a, y in zip(advantages, logps, strict=True)]
    if o.optimal_token_baseline:
        if prompts is None or log_sum_p2 is None:
            raise ValueError("optimal_token_baseline needs prompts and log_sum_p2")
        given = without_baseline(logps, log_sum_p2, given, prompts)
    keep = _kept(logps, entropy, o.top_entropy_quantile)
    total = zero(logps)
    if o.loss_type in PROMPT_TERMS:
        total = total + _prompts_loss(logps, old_logps, given, prompts, o)
    chosen = chosen_of(logps, old_logps, drawn_by, given, o)
    for i, y in enumerate(logps):
        if len(y) == 0 or o.loss_type in PROMPT_TERMS:
            continue
        ref = None if ref_logps is None else ref_logps[i].detach()
        own = None if chosen is None else chosen[i]
        loss = _sequence_loss(y, old_logps[i], ref, given[i], keep[i], o, drawn_by[i], own)
        total = total + loss / _divisor(i, [len(x) for x in logps], prompts, o)
    if o.entropy_coef and entropy is not None:
        acting = [
            h for row, flags in zip(entropy, keep, strict=True) for h, kept in zip(row, flags, strict=True) if kept
        ]
        for h in acting:  # a mean over the tokens that the policy term acts on, whatever divides that term
            total = total - o.entropy_coef * h / len(acting)
    if o.positive_nll_coef:  # VAPO, arXiv 2504.05118: imitate what was right, each of its tokens alike
        right = [x for y, row in zip(logps, given, strict=True) for x, a in zip(y, row, strict=True) if a > 0]
        for x in right:
            total = total - o.positive_nll_coef * x / len(right)
    return total


def _prompts_loss(
    logps: Sequence[Tensor],
    old: Sequence[Tensor],
    advantages: Sequence[Sequence[float]],
    prompts: Sequence[int] | None,
    o: Options,
) -> Tensor:
    """The mean over prompts of one term of all completions of a prompt."""
    if prompts is None:
        raise ValueError(f"{o.loss_type} needs prompts")
    total = zero(logps)
    for prompt in set(prompts):
        of_it = [i for i, p in enumerate(prompts) if p == prompt and len(logps[i])]
        group = [(logps[i], old[i], advantages[i][0]) for i in of_it]
        total = total + PROMPT_TERMS[o.loss_type](group, o) / len(set(prompts))
    return total


def _refuse_undefined(o: Options, ref_logps: object, entropy: object) -> None:
    """Raise ValueError for what is missing, and for combinations that no paper defines."""
    if (o.beta or o.loss_type == "a2po") and ref_logps is None:
        raise ValueError(f"loss_type={o.loss_type}, beta={o.beta} needs ref_logps")
    if (o.entropy_coef or o.top_entropy_quantile < 1) and entropy is None:
        raise ValueError("entropy_coef and top_entropy_quantile need entropy")
    if o.importance_sampling_level not in ("token", "sequence", "sequence_token"):
        raise ValueError(f"no formula for importance_sampling_level={o.importance_sampling_level!r}")
    if o.loss_type == "rloo" and (o.beta or o.top_entropy_quantile < 1 or o.delta is not None):
        raise ValueError(
            "rloo is one term a sequence: its KL is in the reward, and it has no delta and no chosen tokens"
        )
    if o.loss_type == "gmpo" and o.delta is not None:
        raise ValueError("gmpo has no delta")


def _each(advantage: float | Tensor | Sequence[float], length: int) -> list[float]:
    """One for each token."""
    if isinstance(advantage, Tensor) and advantage.ndim == 0:
        advantage = float(advantage)
    if isinstance(advantage, int | float):
        return [float(advantage)] * length
    values = [float(a) for a in advantage]
    if len(values) != length:
        raise ValueError(f"{len(values)} advantages for {length} tokens")
    return values


AGGREGATIONS = {
    **dict.fromkeys(
        ("grpo", "sapo", "cfpo", "pspo"), "sequence_mean"
    ),  # 1/G sum_i 1/|o_i| sum_t, arXiv 2402.03300 Eq. 3
    **dict.fromkeys(("reinforce", "prime", "fipo", "m2po", "clip_cov", "kl_cov"), "token_mean"),  # as DAPO
    **dict.fromkeys(("topr", "kimi"), "sequence_sum"),  # log p of the whole answer
    **dict.fromkeys(("dapo", "bnpo", "cispo", "vespo"), "token_mean"),  # 2503.14476 Eq. 8; bnpo's batch is the step
    "dr_grpo": "constant_length",  # arXiv 2503.20783
    **dict.fromkeys(("luspo", "gmpo", "rloo", "a2po"), "sequence_sum"),  # 2602.05261; the others: one term a sequence
}
"""loss_type -> its own normaliser."""


def _divisor(i: int, lengths: Sequence[int], prompts: Sequence[int] | None, o: Options) -> float:
    """What the loss of sequence i, a sum over its tokens, is divided by."""
    if o.loss_type not in AGGREGATIONS:
        raise ValueError(f"no formula for GRPO's loss_type={o.loss_type!r}")
    name = AGGREGATIONS[o.loss_type] if o.loss_aggregation is None else o.loss_aggregation
    if name == "prompt_mean":
        if prompts is None:
            raise ValueError("prompt_mean needs prompts")
        tokens = sum(n for n, prompt in zip(lengths, prompts, strict=True) if prompt == prompts[i])
        return tokens * len(set(prompts))
    return {
        "token_mean": sum(lengths),
        "sequence_mean": lengths[i] * len(lengths),
        "sequence_sum": len(lengths),
        "constant_length": len(lengths) * o.max_completion_length,
    }[name]


def _sequence_loss(
    y: Tensor,
    old: Tensor,
    ref: Tensor | None,
    advantages: Sequence[float],
    keep: Sequence[bool],
    o: Options,
    mu: Tensor,
    chosen: Chosen | None,
) -> Tensor:
    """The loss of one sequence before its divisor: a sum over tokens, or the one term of gmpo and rloo."""
    # arXiv 2512.02556 Eq. 9: a bad answer that the policy has long left teaches nothing
    left = o.off_policy_mask_threshold is not None and float((mu - y.detach()).sum()) / len(y) > (
        o.off_policy_mask_threshold
    )
    w = [weights(y, old, mu, a, o)[t] for t, a in enumerate(advantages)]
    if o.loss_type == "a2po":  # arXiv 2505.20686: the implicit reward of the whole answer is regressed on A
        assert ref is not None
        return (0 if left and advantages[0] < 0 else 1) * (o.a2po_beta * (y - ref).sum() - advantages[0]) ** 2
    if o.loss_type in ("gmpo", "rloo"):
        (advantage,) = set(advantages)
        gone = left and advantage < 0
        whole = rloo(y, old, advantage, o) if o.loss_type == "rloo" else gmpo(y, old, advantage, keep, o)
        loss = 0 * y.sum() if gone else w[0] * whole
        for t in range(len(y)):
            if o.beta and ref is not None:  # the sequence mean, never corrected
                loss = loss + o.beta * kl_estimate(y[t], ref[t], o.kl_estimator) / len(y)
        return loss
    loss = 0 * y.sum()
    for t, advantage in enumerate(advantages):
        ratio = _ratio(y, old, t, o)
        if keep[t] and not (left and advantage < 0):
            if o.loss_type == "vespo":  # W is of the policy that drew: each weight is a factor of it
                loss = loss - vespo_weight(y, old, advantage, o, w) * advantage * y[t]
            elif o.loss_type == "prime":  # what is masked keeps its penalty
                loss = loss - w[t] * ratio * advantage + o.log_ratio_coef * (y[t] - mu[t]) ** 2
            else:
                term = (
                    policy_term(y, old, t, ratio, advantage, o) if chosen is None else chosen.term(y, old, t, ratio, o)
                )
                loss = loss + w[t] * term
        if o.beta and ref is not None:
            kl = kl_estimate(y[t], ref[t], o.kl_estimator)  # k3: 2402.03300 Eq. 4
            if o.use_bias_correction_kl:
                kl = ratio * kl  # arXiv 2512.02556 Eq. 7
            loss = loss + o.beta * kl
    return loss


def _ratio(y: Tensor, old: Tensor, t: int, o: Options) -> Tensor:
    """Of token t, or of its sequence."""
    if o.importance_sampling_level == "token":
        return torch.exp(y[t] - old[t])  # arXiv 2402.03300 Eq. 3
    s = torch.exp((y - old).sum() / len(y))  # s_i, arXiv 2507.18071 Sec. 4.1
    if o.importance_sampling_level == "sequence":
        return s
    return s.detach() * torch.exp(y[t]) / torch.exp(y[t]).detach()  # Eq. 14


def _kept(logps: Sequence[Tensor], entropy: Sequence[Tensor] | None, share: float) -> list[list[bool]]:
    """The tokens whose entropy is in the top `share` of the step: arXiv 2506.01939, ties with the bound included."""
    if share >= 1 or entropy is None:
        return [[True] * len(y) for y in logps]
    everything = [float(h.detach()) for row in entropy for h in row]
    if not everything:
        return [[] for _ in logps]
    bound = _quantile(everything, 1 - share)
    return [[float(h.detach()) >= bound for h in row] for row in entropy]


def _quantile(values: Sequence[float], q: float) -> float:
    """Between the two order statistics around q (n - 1), linearly."""
    ordered = sorted(values)
    below = math.floor(q * (len(ordered) - 1))
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (q * (len(ordered) - 1) - below) * (ordered[above] - ordered[below])
