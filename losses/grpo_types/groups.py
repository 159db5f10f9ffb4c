"""Surrogates of a whole prompt: one term of all its completions, in whichever micro-batch each of them is.

Each completion has a part of it: the parts' values add up to the term, and the gradient of each part is the term's with
respect to that completion, whose coefficients come from what the step collected. rho, A and the rest are those of
`grpo.py`; all values are to be minimised.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..types import Totals, divide
from .base import GRPO_TYPES, GRPOType, Ratios
from .ratios import WHOLE

if TYPE_CHECKING:
    from ..grpo import GRPOLoss


def over_prompts(x: Ratios, totals: Totals, loss: GRPOLoss) -> Tensor:
    """1 / P: the mean over prompts."""
    return divide(1 / x.lengths, totals.num_prompts)  # a completion's part stands at each of its tokens


def rows(x: Ratios, *columns: Tensor) -> Tensor:
    """[C, 1 + k] float64: the prompt, NaN where nothing is scored, and k numbers [C, 1] each."""
    assert x.prompts is not None
    prompts = x.prompts.double().masked_fill(~x.kept.any(-1, keepdim=True), math.nan)
    return torch.cat([prompts, *(column.double() for column in columns)], -1)


def of_prompt(x: Ratios) -> Tensor:
    """[C, n] bool, which rows of the step are of a completion's prompt."""
    assert x.step is not None
    assert x.prompts is not None
    return x.prompts == x.step[:, 0]


def log_sum_exp(values: Tensor, where: Tensor) -> Tensor:
    """[C, 1], log sum exp of [n] or [C, n] `where` [C, n] is True, no gradient."""
    return torch.where(where, values, -math.inf).logsumexp(-1, keepdim=True)


def label_terms(x: Ratios, loss: GRPOLoss) -> Tensor:
    """[C, 3]: the prompt, s / tau, and the label, the sign of A."""
    return rows(x, x.log_ratio.sum(-1, keepdim=True) / x.lengths / loss.real_temperature, x.advantages.sign())


def labelled(x: Ratios, loss: GRPOLoss) -> Tensor:
    """log(1 + sum_right exp(-s / tau)) + log(1 + sum_wrong exp(s / tau)) of a prompt, REAL, arXiv 2602.05630, s the
    mean of log rho over the completion, tau `real_temperature` (the default is ms-swift's).

    Reading: the labels are the signs of A, and what has A = 0, as where all answers are alike, has none. There they are
    rewards of 0 and 1: with an advantage of one's own, R - 1/2, such prompts count, too.
    """
    assert x.step is not None
    label = x.advantages.sign()
    z = -label * x.log_ratio.sum(-1, keepdim=True) / x.lengths / loss.real_temperature
    same = of_prompt(x) & (x.step[:, 2] == label)
    others = log_sum_exp(-x.step[:, 2] * x.step[:, 1], same)
    total = torch.logaddexp(others, torch.zeros_like(others)).to(z.dtype)
    slope = (z.detach() - total).exp()
    part = total / same.sum(-1, keepdim=True).clamp(min=1) + slope * (z - z.detach())
    return torch.where(label == 0, z, part)  # which is 0 there


def target_terms(x: Ratios, loss: GRPOLoss) -> Tensor:
    """[C, 3]: the prompt, log p(y), and log p_old(y) + A / eta."""
    return rows(x, *target_logits(x, loss))


def target_logits(x: Ratios, loss: GRPOLoss) -> tuple[Tensor, Tensor]:
    """log p(y) and log p_old(y) + A / eta, [C, 1] each."""
    log_p = x.logps.sum(-1, keepdim=True)
    return log_p, log_p - x.log_ratio.sum(-1, keepdim=True) + x.advantages / loss.target_po_temperature


def target(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-sum_i q_i log p_i of a prompt, p and q the shares of p(y_i) and of p_old(y_i) exp(A_i / eta) among its
    completions: Target Policy Optimization, arXiv 2604.06159 Eq. 3; the gradient in log p(y_i) is p_i - q_i.

    Reading: its standardized scores u are A, as the advantage_type group has them; eta is `target_po_temperature`.
    """
    assert x.step is not None
    (log_p, log_q), of_one = target_logits(x, loss), of_prompt(x)
    all_p, all_q = (log_sum_exp(x.step[:, column], of_one).to(log_p.dtype) for column in (1, 2))
    p, q = ((a.detach() - b).clamp(max=0).exp() for a, b in ((log_p, all_p), (log_q, all_q)))
    return q * (all_p - log_p.detach()) + (p - q) * (log_p - log_p.detach())  # -inf where nothing is scored, nor read


for _name, _formula, _terms in (("real", labelled, label_terms), ("target_po", target, target_terms)):
    GRPO_TYPES.enter(
        _name,
        GRPOType(
            _formula, over_prompts, sequence_term=True, corrected=(), of_tokens=False, collects=_terms, by_prompt=True
        ),
        reads=(f"{_name}_temperature",),
        ignores=(*WHOLE, "beta", "kl_estimator", "top_entropy_quantile"),
    )
