"""Laws of losses over groups of rollouts; see `family_laws.py`.

rho = exp(log p - log p_old) of a token, r = log p_old - log mu with mu the policy that sampled it, A the advantage of
its completion, d = log p - log p_ref. w is the weight of a token's loss in the sum, by the loss's normaliser:

    token_mean 1 / N    sequence_mean 1 / (B |y|)    sequence_sum 1 / B    constant 1 / (B max_completion_length)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from logratio.losses.types import Loss

from ._law_book import expect, named
from ._law_runs import numbers, run
from .family_laws import close, put_role
from .strategies import Batch


def token_weights(batch: Batch, normaliser: str, max_length: int = 512) -> Tensor:
    """w [C, T], 0 where masked."""
    mask = batch.masks["completion"]
    lengths, count = mask.sum(-1, keepdim=True).double().clamp(min=1), len(mask)
    weights = {
        "token_mean": torch.ones_like(lengths) / max(mask.sum().item(), 1),
        "sequence_mean": 1 / (count * lengths),
        "sequence_sum": torch.ones_like(lengths) / count,
        "constant": torch.ones_like(lengths) / (count * max_length),
    }
    return weights[normaliser] * mask


def log_ratios(batch: Batch, other: str = "old") -> Tensor:
    """log p - log p_old (or another role's), [C, T], 0 where masked."""
    logps = batch.tokens["policy"]["completion"]
    return torch.where(batch.masks["completion"], logps - batch.tokens[other]["completion"], torch.zeros_like(logps))


def averaged(batch: Batch, values: Tensor) -> Tensor:
    """The mean over each completion's scored tokens, at every token, [C, T]."""
    lengths = batch.masks["completion"].sum(-1, keepdim=True).clamp(min=1)
    return (values.sum(-1, keepdim=True) / lengths).expand(values.shape)


def advantages(batch: Batch) -> Tensor:
    """A [C, 1]"""
    return batch.rows["advantages"][:, None]


def without_advantages(batch: Batch) -> Batch:
    """A = 0: what is left is the KL term and what does not depend on rewards."""
    return replace(batch, rows={"advantages": 0 * batch.rows["advantages"]})


def same_tokens(got: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless the gradients are equal up to rounding."""
    off, bound = (got - expected).abs().max(), 1e-9 * expected.abs().max() + 1e-13
    expect(off <= bound, f"the gradient is {numbers(got)}, expected {numbers(expected)}")


@named
def reinforce_on_policy(loss: Loss, batch: Batch, normaliser: str) -> None:
    """Where old = policy, G = -w A: that of REINFORCE."""
    there = put_role(batch, old="policy")
    same_tokens(run(loss, there).grads["completion"], -token_weights(batch, normaliser) * advantages(batch))


@named
def wide_clip(loss: Loss, batch: Batch, normaliser: str, level: str = "token") -> None:
    """Without a clip, L = -sum of w rho A and G = -w rho A; at sequence level with exp(mean log rho) for rho."""
    log_rho = log_ratios(batch) if level == "token" else averaged(batch, log_ratios(batch))
    expected = -token_weights(batch, normaliser) * log_rho.exp() * advantages(batch)
    got = run(loss, batch)
    close(got.loss.item(), expected.sum().item(), terms=expected.abs().sum().item())
    same_tokens(got.grads["completion"], expected)


@named
def dual_clip(loss: Loss, batch: Batch, normaliser: str, low: float, high: float, cap: float) -> None:
    """L = -sum of w max(min(rho A, clip(rho) A), cap A) where A < 0, without the max elsewhere (PPO's dual clip)."""
    rho, a = log_ratios(batch).exp(), advantages(batch)
    pessimistic = torch.minimum(rho * a, rho.clamp(low, high) * a)
    dual = torch.where(a < 0, torch.maximum(pessimistic, cap * a), pessimistic)
    expected = -token_weights(batch, normaliser) * dual
    close(run(loss, batch).loss.item(), expected.sum().item(), terms=expected.abs().sum().item())


@named
def corrected_on_policy(loss: Loss, plain: Loss, batch: Batch) -> None:
    """Where mu = old = policy, L and G are those without a correction, to the bit."""
    there = put_role(batch, old="policy", behavior="policy")
    got, expected = run(loss, there), run(plain, there)
    expect(got.loss == expected.loss, f"the loss is {got.loss.item():.17g}, expected {expected.loss.item():.17g}")
    grad, wanted = got.grads["completion"], expected.grads["completion"]
    expect(torch.equal(grad, wanted), f"the gradient is {numbers(grad)}, expected {numbers(wanted)}")


@named
def constant_weights(loss: Loss, plain: Loss, batch: Batch, weight: Callable[[Tensor], Tensor]) -> None:
    """G = weight(r) G(plain): weights have no gradient of their own, and what they leave out stays in the divisors.

    weight: of r, [C, T], 0 where masked, to [C, T] or [C, 1].
    """
    log_ratio = log_ratios(put_role(batch, policy="old", old="behavior"))
    same_tokens(run(loss, batch).grads["completion"], weight(log_ratio) * run(plain, batch).grads["completion"])


@named
def monotone_range(narrow: Loss, wide: Loss, batch: Batch) -> None:
    """A wider range never makes a token's gradient smaller."""
    small, large = (run(loss, batch).grads["completion"].abs() for loss in (narrow, wide))
    expect((small <= large * (1 + 1e-12)).all(), f"narrow {numbers(small)}, wide {numbers(large)}")


@named
def only_seen(loss: Loss, batch: Batch) -> None:
    """Without a correction, L and G do not depend on what the sampler said."""
    got, expected = run(loss, batch), run(loss, batch, behavior=None)
    expect(got.loss == expected.loss, f"the loss is {got.loss.item():.17g}, expected {expected.loss.item():.17g}")
    expect(torch.equal(got.grads["completion"], expected.grads["completion"]), "the gradient is another")
    new = got.metrics.keys() - expected.metrics.keys()
    expect(all(name.startswith("sampling/") for name in new) and new, f"what is new among the metrics: {sorted(new)}")


KL = {
    "k1": (lambda d: d, torch.ones_like),
    "k2": (lambda d: d**2 / 2, lambda d: d),
    "k3": (lambda d: torch.expm1(-d) + d, lambda d: -torch.expm1(-d)),
    "k3+": (lambda d: torch.expm1(-d) + d, lambda d: d),
    "abs": (torch.abs, torch.sign),
}
"""k(d) and its slope."""


@named
def kl_estimators(loss: Loss, batch: Batch, weight: float, normaliser: str, estimator: str, corrected: bool) -> None:
    """Where A = 0, L = weight * sum of w k(d), and of w rho k(d) if corrected, whose slope is rho (k + k')."""
    k, slope = KL[estimator]
    d, rho = log_ratios(batch, "ref"), log_ratios(batch).exp() if corrected else 1.0
    w = weight * token_weights(batch, normaliser)
    got = run(loss, without_advantages(batch))
    terms = w * rho * k(d)
    close(got.loss.item(), terms.sum().item(), terms=terms.abs().sum().item())
    same_tokens(got.grads["completion"], w * rho * (slope(d) + (k(d) if corrected else 0)))


@named
def kl_is_not_negative(loss: Loss, batch: Batch) -> None:
    """Where A = 0, L >= 0, and L = 0 with G = 0 where policy = reference."""
    got = run(loss, without_advantages(batch))
    expect(got.loss >= 0, f"the loss is {got.loss.item()}")
    there = run(loss, without_advantages(put_role(batch, policy="ref")))
    expect(there.loss == 0 and (there.grads["completion"] == 0).all(), f"at the reference it is {there.loss.item()}")


def vocabulary(policy: Tensor, ref: Tensor, old: Tensor) -> Batch:
    """Every one-token completion of a vocabulary once, with these log-probabilities [V]: a mean over them all is exact
    where the completions are sampled from a uniform distribution."""
    tokens = {"policy": policy, "ref": ref, "old": old, "behavior": old, "entropy": torch.zeros_like(policy)}
    return Batch(
        "grouped",
        {"completion": torch.ones(len(policy), 1, dtype=torch.bool)},
        {role: {"completion": logps[:, None]} for role, logps in tokens.items()},
        {"advantages": torch.zeros_like(policy)},
        torch.zeros(0),
    )


@named
def kl_in_expectation(loss: Loss, logits: Tensor, ref_logits: Tensor, sampler: str, of: str) -> None:
    """E[G] over a vocabulary is the gradient of a KL divergence, of weight 1; logits: [V].

    sampler: "old" (uniform, not the policy) or "policy" (which is uniform then: `logits` are not used).
    of: "reverse", KL(policy || ref), or "forward", KL(ref || policy).
    """
    count = len(logits)
    uniform = torch.full((count,), -math.log(count), dtype=torch.float64)
    theta = (torch.zeros_like(logits) if sampler == "policy" else logits).clone().requires_grad_()
    policy, ref = theta.log_softmax(0), ref_logits.log_softmax(0)
    kl = (policy.exp() * (policy - ref)).sum() if of == "reverse" else (ref.exp() * (ref - policy)).sum()
    (expected,) = torch.autograd.grad(kl, theta, retain_graph=True)
    got = run(loss, vocabulary(policy.detach(), ref, uniform))
    (through,) = torch.autograd.grad(policy, theta, got.grads["completion"][:, 0])
    same_tokens(through[:, None], expected[:, None])
    if sampler == "old" and of == "reverse":
        close(got.loss.item(), kl.item())


@named
def soft_gate(loss: Loss, batch: Batch, normaliser: str, positive: float, negative: float) -> None:
    """SAPO: where rho = 1, L = -sum of w 2 A / tau with tau by the sign of A, and G = -w A."""
    there = put_role(batch, old="policy")
    a = advantages(batch)
    tau = torch.where(a > 0, positive, negative)
    expected = -token_weights(batch, normaliser) * 2 * a / tau
    close(run(loss, there).loss.item(), expected.sum().item(), terms=expected.abs().sum().item())
    reinforce_on_policy(loss, batch, normaliser)


@named
def gamma_weight(loss: Loss, advantage: float, k: float, lam: float) -> None:
    """VESPO, phi = -G / A of one token: phi(W = 1) = 1, d phi / d log W = k - lam there, and most at W = k / lam."""

    def phi(log_w: float) -> float:
        one = torch.full((1,), -2.0, dtype=torch.float64)
        batch = vocabulary(one, one, one - log_w)
        batch.rows["advantages"][:] = advantage
        return -run(loss, batch).grads["completion"].item() / advantage

    close(phi(0.0), 1.0)
    close((phi(1e-5) - phi(-1e-5)) / 2e-5, k - lam, terms=1, rtol=1e-6)
    top = phi(math.log(k / lam))
    expect(top >= max(phi(math.log(k / lam) + by) for by in (-1, -0.01, 0.01, 1)), f"{top:.12g} is not the most")
