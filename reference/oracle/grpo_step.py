"""What of GRPO compares tokens or completions with others of the step; `o` are the `Options` of `grpo.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from logratio.reference.oracle._math import softplus
from logratio.reference.oracle.grpo_tokens import policy_term

if TYPE_CHECKING:
    from logratio.reference.oracle.grpo import Options

Rows = Sequence[Sequence[float]]
Place = tuple[int, int]


@dataclass(frozen=True)
class Chosen:
    """One completion's tokens: how far each is chosen, from 0 to 1, its advantage, and its log-prob in what drew it."""

    shares: Sequence[float]
    advantages: Sequence[float]
    mu: Tensor

    def term(self, y: Tensor, old: Tensor, t: int, ratio: Tensor, o: Options) -> Tensor:
        """The loss of token t."""
        share, a = self.shares[t], self.advantages[t]
        if o.loss_type == "m2po":  # arXiv 2510.01161: M r A, M = 0 for what is chosen; r is to what drew it
            return -(1 - share) * torch.exp(y[t] - self.mu[t]) * a
        if o.loss_type == "clip_cov":  # arXiv 2505.22617: no gradient of what is chosen
            return (1 - share) * policy_term(y, old, t, ratio, a, o)
        return -ratio * a + o.kl_cov_coef * share * (y[t] - old[t]).abs()  # kl_cov, the same paper


def chosen_of(
    logps: Sequence[Tensor], old: Sequence[Tensor], mu: Sequence[Tensor], advantages: Rows, o: Options
) -> list[Chosen] | None:
    """Of each completion; None for a loss_type that chooses nothing."""
    if o.loss_type not in ("m2po", "clip_cov", "kl_cov"):
        return None
    logps = [y.detach() for y in logps]
    places = [(i, t) for i, y in enumerate(logps) for t in range(len(y))]
    if o.loss_type == "m2po":
        gains = {(i, t): float(logps[i][t] - mu[i][t]) for i, t in places}
        shares = _outliers({p: gains[p] ** 2 for p in places if gains[p] * advantages[p[0]][p[1]] > 0}, o)
    else:
        mean_p = math.fsum(float(logps[i][t]) for i, t in places) / max(len(places), 1)
        mean_a = math.fsum(advantages[i][t] for i, t in places) / max(len(places), 1)
        cov = {(i, t): (float(logps[i][t]) - mean_p) * (advantages[i][t] - mean_a) for i, t in places}
        k = max(math.floor(o.cov_share * len(places) + 1e-9), 1)
        shares = (
            _largest(cov, k) if o.loss_type == "kl_cov" else _mean_draw(_moderate(cov, logps, old, advantages, o), k)
        )
    return [Chosen([shares.get((i, t), 0.0) for t in range(len(y))], advantages[i], mu[i]) for i, y in enumerate(logps)]


def _outliers(moments: dict[Place, float], o: Options) -> dict[Place, float]:
    """Algorithm 1: the largest goes (with its equals) until the mean of the rest is at most the threshold."""
    left = dict(moments)
    while left and math.fsum(left.values()) / len(left) > o.m2po_threshold:
        most = max(left.values())
        left = {place: m for place, m in left.items() if m < most}
    return {place: 1.0 for place in moments if place not in left}


def _moderate(
    cov: dict[Place, float], logps: Sequence[Tensor], old: Sequence[Tensor], advantages: Rows, o: Options
) -> list[Place]:
    """Covariances within the range, of tokens whose ratio the clip leaves alone."""
    out = []
    for (i, t), c in cov.items():
        ratio, a = float(torch.exp(logps[i][t] - old[i][t])), advantages[i][t]
        if o.importance_sampling_level != "token":
            ratio = math.exp(float((logps[i] - old[i]).sum()) / len(old[i]))
        clips = (a > 0 and ratio > 1 + o.high) or (a < 0 and ratio < 1 - o.low)
        if o.clip_cov_low < c < o.clip_cov_high and not clips:
            out.append((i, t))
    return out


def _mean_draw(places: list[Place], k: int) -> dict[Place, float]:
    """The chance of each to be among k that are drawn of them."""
    return {place: min(k / len(places), 1.0) for place in places}


def _largest(cov: dict[Place, float], k: int) -> dict[Place, float]:
    """The k largest; the last places are shared by those that are equal."""
    if not cov:
        return {}
    last = sorted(cov.values(), reverse=True)[k - 1]
    above, equal = sum(c > last for c in cov.values()), sum(c == last for c in cov.values())
    return {place: 1.0 if c > last else (k - above) / equal for place, c in cov.items() if c >= last}


Group = Sequence[tuple[Tensor, Tensor, float]]
"""Of each completion of a prompt: log p and log p_old of its tokens, and its advantage."""


def _real(group: Group, o: Options) -> Tensor:
    """arXiv 2602.05630: log(1 + sum over right of e^(-s/tau)) + log(1 + sum over wrong of e^(s/tau))."""
    total = torch.zeros((), dtype=torch.float64)
    for sign in (1, -1):
        of_it = [-sign * (y - old).sum() / len(y) / o.real_temperature for y, old, a in group if a * sign > 0]
        if of_it:
            total = total + softplus(torch.logsumexp(torch.stack(of_it), 0))
    return total


def _target(group: Group, o: Options) -> Tensor:
    """arXiv 2604.06159 Eq. 1 to 3: the cross-entropy of p to the target q."""
    if not group:
        return torch.zeros((), dtype=torch.float64)
    log_p = torch.stack([y.sum() for y, _, _ in group]).log_softmax(0)
    q = torch.stack([old.sum() + a / o.target_po_temperature for _, old, a in group]).softmax(0)
    return -(q * log_p).sum()


PROMPT_TERMS: dict[str, Callable[[Group, Options], Tensor]] = {"real": _real, "target_po": _target}
"""loss_type -> (a prompt's completions, options) -> its term."""


def without_baseline(
    logps: Sequence[Tensor], log_sum_p2: Sequence[Tensor], advantages: Rows, prompts: Sequence[int]
) -> list[list[float]]:
    """arXiv 2602.07078: A less sum W A / sum W over the prompt's completions that have such a token, W the sum so far
    of 1 - 2 p + sum_v p_v^2; A itself where no other has one."""
    energies: list[list[float]] = []
    for y, s in zip(logps, log_sum_p2, strict=True):
        so_far, row = 0.0, []
        for log_p, log_p2 in zip(y.detach().tolist(), s.detach().tolist(), strict=True):
            so_far += max(1 - 2 * math.exp(log_p) + math.exp(log_p2), 0.0)
            row.append(so_far)
        energies.append(row)
    out = []
    for i, given in enumerate(advantages):
        left = []
        for t, a in enumerate(given):
            there = [j for j, p in enumerate(prompts) if p == prompts[i] and len(energies[j]) > t]
            total = math.fsum(energies[j][t] for j in there)
            weighted = math.fsum(energies[j][t] * advantages[j][t] for j in there)
            left.append(a - weighted / total if len(there) > 1 and total > 0 else a)
        out.append(left)
    return out
