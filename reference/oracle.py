"""Every formula again, from its paper: float64, one sequence and one token at a time, nothing clever.

It imports torch and math only and shares no helper with `losses/`, so that a mistake would have to be made twice to
go unseen. Gradients come from autograd on these formulas.

Everywhere: a completion is a 1-D tensor of the log-probabilities (nats) of its scored tokens; a step is a list of
them; each loss returns the scalar loss of one whole optimizer step. Reference and old log-probabilities get no
gradient. Where the papers are silent: an example with nothing to score has no loss and still counts in the number of
examples, and an empty completion beside a full one has log-probability 0 and length 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenLogps(NamedTuple):
    """logps, entropy: [N] float64, nats."""

    logps: Tensor
    entropy: Tensor


class SequenceLogps(NamedTuple):
    """completion: [C] of every completion token; prompt: [P - 1], of every prompt token but the first."""

    completion: Tensor
    prompt: Tensor


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenLogps:
    """log p(target) and the entropy under softmax(z), z = softcap tanh(logit_scale (W h + b) / softcap) / temperature.

    hidden [N, H], weight [V, H], targets [N] int64, bias [V].
    """
    logps, entropies = [], []
    for h, target in zip(hidden.double(), targets.tolist(), strict=True):
        z = weight.double() @ h
        if bias is not None:
            z = z + bias.double()
        z = z * logit_scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / temperature
        largest = z.detach().max()
        log_z = largest + torch.log(torch.sum(torch.exp(z - largest)))
        logps.append(z[target] - log_z)
        entropies.append(log_z - torch.sum(torch.exp(z - log_z) * z))  # -sum p log p, log p = z - log Z
    empty = hidden.new_zeros(0, dtype=torch.float64)
    return TokenLogps(torch.stack(logps) if logps else empty, torch.stack(entropies) if entropies else empty)


def sequence_logps(model: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> SequenceLogps:
    """One forward of a causal language model on prompt + completion alone, neither padded nor packed: full logits.

    In the model's dtype (meant for a float64 model), with its graph and on its device. Raises ValueError without a
    prompt, since nothing then predicts the first token.
    """
    if not len(prompt_ids):
        raise ValueError("sequence_logps needs at least one prompt token to predict the first completion token")
    ids = torch.tensor([[*prompt_ids, *completion_ids]], device=model.get_input_embeddings().weight.device)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    log_p = torch.log_softmax(logits, dim=-1)
    scored = (
        torch.stack([log_p[t - 1, ids[0, t]] for t in range(1, ids.shape[1])]) if ids.shape[1] > 1 else log_p[:0, 0]
    )
    return SequenceLogps(completion=scored[len(prompt_ids) - 1 :], prompt=scored[: len(prompt_ids) - 1])


def sft(logps: Sequence[Tensor], *, loss_type: str = "nll") -> Tensor:
    """Token mean over the step of -log p (`nll`) or of -sg(p) log p (`dft`, arXiv 2508.05629)."""
    total, tokens = _zero(logps), 0
    for sequence in logps:
        for logp in sequence:
            if loss_type == "nll":
                total = total - logp
            elif loss_type == "dft":
                total = total - math.exp(float(logp.detach())) * logp
            else:
                raise ValueError(f"no formula for SFT's loss_type={loss_type!r}")
            tokens += 1
    return total / max(tokens, 1)


def dpo(
    chosen: Sequence[Tensor],
    rejected: Sequence[Tensor],
    ref_chosen: Sequence[Tensor],
    ref_rejected: Sequence[Tensor],
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
) -> Tensor:
    """Mean over pairs; r is log pi(y|x) - log pi_ref(y|x), summed over tokens."""
    total = _zero(chosen)
    for y_w, y_l, ref_w, ref_l in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True):
        if len(y_w) + len(y_l) == 0:
            continue
        r_w = y_w.sum() - ref_w.detach().sum()
        r_l = y_l.sum() - ref_l.detach().sum()
        if loss_type == "sigmoid":
            total = total + _softplus(-beta * (r_w - r_l))  # -log sigmoid(beta (r_w - r_l)), arXiv 2305.18290 Eq. 7
        elif loss_type == "hinge":
            margin = 1 - beta * (r_w - r_l)  # arXiv 2309.06657, the hinge of SLiC with beta r as its score
            total = total + (margin if margin > 0 else 0 * margin)
        elif loss_type == "ipo":
            h = r_w / max(len(y_w), 1) - r_l / max(len(y_l), 1)  # token means, as its authors recommend in practice
            total = total + (h - 1 / (2 * beta)) ** 2  # arXiv 2310.12036 Eq. 17
        else:
            raise ValueError(f"no formula for DPO's loss_type={loss_type!r}")
    return total / max(len(chosen), 1)


def kto(
    logps: Sequence[Tensor],
    ref_logps: Sequence[Tensor],
    labels: Sequence[bool],
    kl_logps: Sequence[Tensor],
    kl_ref_logps: Sequence[Tensor],
    *,
    beta: float = 0.1,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Mean over examples. kl_*: completions of other examples under this step's prompts, for z_0; no gradient."""
    if loss_type != "kto":
        raise ValueError(f"no formula for KTO's loss_type={loss_type!r}")
    mismatched = [float(p.detach().sum() - q.detach().sum()) for p, q in zip(kl_logps, kl_ref_logps, strict=True)]
    z_0 = max(0.0, math.fsum(mismatched) / len(mismatched))  # arXiv 2402.01306, the estimate below Eq. 8
    total = _zero(logps)
    for y, ref, desirable in zip(logps, ref_logps, labels, strict=True):
        if len(y) == 0:
            continue
        r = y.sum() - ref.detach().sum()
        if desirable:  # arXiv 2402.01306 Eqs. 7, 8: lambda_y - v(x, y), v = lambda_D sigmoid(beta (r - z_0))
            total = total + desirable_weight * _one_minus_sigmoid(beta * (r - z_0))
        else:  # v = lambda_U sigmoid(beta (z_0 - r))
            total = total + undesirable_weight * _one_minus_sigmoid(beta * (z_0 - r))
    return total / max(len(logps), 1)


def orpo(
    prompt_logps: Sequence[Tensor], chosen: Sequence[Tensor], rejected: Sequence[Tensor], *, beta: float = 0.1
) -> Tensor:
    """L_SFT + beta L_OR (arXiv 2403.07691 Eq. 6); L_SFT is the token mean over prompts and chosen completions.

    Raises ValueError where one completion of a pair is empty: its odds are not defined.
    """
    nll, tokens, odds_loss = _zero(chosen), 0, _zero(chosen)
    for prompt, y_w, y_l in zip(prompt_logps, chosen, rejected, strict=True):
        nll = nll - prompt.sum() - y_w.sum()
        tokens += len(prompt) + len(y_w)
        if len(y_w) + len(y_l) == 0:
            continue
        if len(y_w) == 0 or len(y_l) == 0:
            raise ValueError("ORPO's odds of an empty completion are not defined")
        log_odds_ratio = _log_odds(y_w) - _log_odds(y_l)  # Eq. 5
        odds_loss = odds_loss + _softplus(-log_odds_ratio)  # -log sigmoid(.), Eq. 7
    return nll / max(tokens, 1) + beta * odds_loss / max(len(chosen), 1)


def grpo(
    logps: Sequence[Tensor],
    old_logps: Sequence[Tensor] | None,
    ref_logps: Sequence[Tensor] | None,
    advantages: Sequence[float] | Tensor,
    *,
    loss_type: str = "dapo",
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    importance_sampling_level: str = "token",
    use_bias_correction_kl: bool = True,
    max_completion_length: int = 512,
) -> Tensor:
    """The clipped surrogate plus beta KL, averaged as `loss_type` says. Without `old_logps` the step is on policy."""
    old_logps = [y.detach() for y in logps] if old_logps is None else old_logps
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    total, tokens = _zero(logps), sum(len(y) for y in logps)
    for i, (y, old, advantage) in enumerate(zip(logps, old_logps, advantages, strict=True)):
        per_sequence = _zero(logps)
        for t in range(len(y)):
            if importance_sampling_level == "token":
                ratio = torch.exp(y[t] - old[t].detach())  # arXiv 2402.03300 Eq. 3
            elif importance_sampling_level == "sequence":
                ratio = torch.exp((y - old.detach()).sum() / len(y))  # s_i, arXiv 2507.18071 Sec. 4.1
            else:
                raise ValueError(f"no formula for importance_sampling_level={importance_sampling_level!r}")
            clipped = torch.clamp(ratio, 1 - epsilon, high)  # epsilon_high: arXiv 2503.14476 Sec. 3.1
            term = -torch.minimum(ratio * float(advantage), clipped * float(advantage))  # 2402.03300 Eq. 3
            if beta:
                if ref_logps is None:
                    raise ValueError(f"beta={beta} needs ref_logps")
                d = ref_logps[i][t].detach() - y[t]
                kl = torch.exp(d) - d - 1  # k3, 2402.03300 Eq. 4
                if use_bias_correction_kl:
                    kl = ratio * kl  # arXiv 2512.02556
                term = term + beta * kl
            per_sequence = per_sequence + term
        if loss_type == "grpo":
            total = total + per_sequence / (max(len(y), 1) * len(logps))  # 1/G sum 1/|o_i|, 2402.03300 Eq. 3
        elif loss_type in ("dapo", "bnpo"):
            total = total + per_sequence / max(tokens, 1)  # 1/sum |o_i|, 2503.14476 Eq. 8; bnpo's batch is the step
        elif loss_type == "dr_grpo":
            total = total + per_sequence / (len(logps) * max_completion_length)  # a constant, arXiv 2503.20783
        else:
            raise ValueError(f"no formula for GRPO's loss_type={loss_type!r}")
    return total


def advantages(rewards: Sequence[Sequence[float]], scale: str = "group") -> list[list[float]]:
    """(R - mean of its group) / (std + 1e-4), arXiv 2402.03300 Sec. 4.1.2, one list a group as the rewards.

    scale: "group" divides by the group's standard deviation, "batch" by that of all rewards (arXiv 2508.08221), both
    with Bessel's correction; "none" does not divide (arXiv 2503.20783).
    """
    everything = [reward for group in rewards for reward in group]
    result = []
    for group in rewards:
        mean = math.fsum(group) / len(group)
        if scale == "none":
            result.append([reward - mean for reward in group])
        elif scale in ("group", "batch"):
            spread = _bessel_std(group if scale == "group" else everything)
            result.append([(reward - mean) / (spread + 1e-4) for reward in group])
        else:
            raise ValueError(f"no formula for scale={scale!r}")
    return result


def _bessel_std(values: Sequence[float]) -> float:
    """The unbiased standard deviation, 0 of a single value."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))


def _log_odds(logps: Tensor) -> Tensor:
    """log(P / (1 - P)), P the exponential of the mean log-probability: arXiv 2403.07691 Eqs. 3, 4."""
    average = logps.sum() / len(logps)
    return average - torch.log(-torch.expm1(average))


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) = -log sigmoid(-x)"""
    return torch.logaddexp(torch.zeros_like(x), x)


def _one_minus_sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^x), through its logarithm, whose gradient does not overflow."""
    return torch.exp(-_softplus(x))


def _zero(logps: Sequence[Tensor]) -> Tensor:
    """0 in float64 with a graph to every completion, so that a loss of nothing still has a gradient."""
    total = torch.zeros((), dtype=torch.float64, device=logps[0].device if len(logps) else None)
    for sequence in logps:
        total = total + 0 * sequence.sum()
    return total
