"""Surrogates that choose tokens by what they are among all of the step: M2PO, and what keeps the entropy up.

rho, A and the rest are those of `grpo.py`; all values are to be minimised. Chosen is without a gradient, and without
chance: alike however the step is cut.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..divergences import MAX_EXPONENT
from .base import GRPO_TYPES, GRPOType, Ratios
from .ratios import CLIP, clipped, ratio_range
from .weights import token_mean

if TYPE_CHECKING:
    from ..grpo import GRPOLoss


def moments(x: Ratios, loss: GRPOLoss) -> Tensor:
    """[C, T, 1], log^2 rho where a step would take rho further from 1: A > 0, rho > 1, or A < 0, rho < 1; else inf."""
    log_ratio = x.from_sampler
    return torch.where(log_ratio * x.advantages > 0, log_ratio.square(), math.inf)[..., None]


def second_moment(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-M rho A, M = 0 for tokens of the largest log^2 rho, else 1, M2PO, arXiv 2510.01161 Algorithm 1: of the tokens
    with A > 0, rho > 1 or A < 0, rho < 1 as many of the smallest stay as have a mean of at most `m2po_threshold`.

    Readings: (1) rho is to what sampled, or to `old` where nobody says; (2) tokens as large as one that goes, go; (3)
    what goes stays in the normaliser. The authors' code holds the ratios of these tokens within one bound instead,
    AReaL chooses among all tokens; both in each micro-batch.
    """
    assert x.step is not None
    ordered = x.step[:, 0].double().sort().values
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    within = (means <= loss.m2po_threshold).sum()
    # the first that is too many; inf where all are within
    limit = torch.cat([ordered, ordered.new_full((1,), math.inf)])[within[None]]
    own = moments(x, loss)[..., 0]
    goes = own.isfinite() & (own >= limit)
    return torch.where(goes, 0.0, -x.from_sampler.clamp(max=MAX_EXPONENT).exp() * x.advantages)


def clip_terms(x: Ratios, loss: GRPOLoss) -> Tensor:
    """[C, T, 3]: A, log p, and 1 where rho is clipped, else 0."""
    ratio, low, high = ratio_range(x, loss)
    outside = ((ratio < low) & (x.advantages < 0)) | ((ratio > high) & (x.advantages > 0))
    return torch.stack(torch.broadcast_tensors(x.advantages, x.logps, outside.to(x.logps.dtype)), -1)


def covariance(terms: Tensor, step: Tensor) -> Tensor:
    """(A - mean A) (log p - mean log p), arXiv 2505.22617, the means over the tokens of the step; float64.

    terms: [..., 2 and more], A and log p; step: [n, 2 and more], those of the step.
    """
    centred = terms[..., :2].double() - step[:, :2].double().mean(0)
    return centred[..., 0] * centred[..., 1]


def chosen_number(step: Tensor, loss: GRPOLoss) -> int:
    """How many of the step's tokens are chosen: a share of them, at least one."""
    return max(math.floor(loss.cov_share * len(step) + 1e-9), 1)


def clip_cov(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-(1 - r) min(rho A, clip(rho) A), Clip-Cov, arXiv 2505.22617: r > 0 where the covariance of A and log p is in
    (clip_cov_low, clip_cov_high) and rho is not clipped, 0 elsewhere.

    Reading: of m such tokens in the step the authors let k = max(cov_share N, 1) at random have no gradient; here each
    of the m has the mean over these draws, r = min(k / m, 1), which needs no chance, and is no other for another cut.
    """
    assert x.step is not None
    step, k = x.step, chosen_number(x.step, loss)

    def inside(terms: Tensor) -> Tensor:
        cov = covariance(terms, step)
        return (cov > loss.clip_cov_low) & (cov < loss.clip_cov_high) & (terms[..., 2] == 0)

    r = k / inside(step).double().sum().clamp(min=k)
    return clipped(x, loss) * torch.where(inside(clip_terms(x, loss)), 1 - r, 1.0).to(x.ratio.dtype)


def kl_cov(x: Ratios, loss: GRPOLoss) -> Tensor:
    """-rho A + kl_cov_coef w |log rho|, KL-Cov, arXiv 2505.22617: w = 1 for the cov_share of the step's tokens with the
    largest covariance of A and log p, 0 elsewhere; no clip.

    As in its authors' code: k = max(cov_share N, 1) tokens, penalised by |log rho|. Reading: where the last of them are
    equal, each has the share that is left, so that none is chosen by its place.
    """
    assert x.step is not None
    policy = -x.ratio * x.advantages
    if not len(x.step):
        return policy
    cov, own = covariance(x.step, x.step), covariance(clip_terms(x, loss), x.step)
    k = chosen_number(x.step, loss)
    last = cov.kthvalue(len(cov) - k + 1).values
    share = (k - (cov > last).double().sum()) / (cov == last).sum()
    w = torch.where(own > last, 1.0, torch.where(own == last, share, 0.0)).to(policy.dtype)
    return policy + loss.kl_cov_coef * w * x.log_ratio.abs()


GRPO_TYPES.enter(
    "m2po",
    GRPOType(second_moment, token_mean, corrected=(), collects=moments),
    reads=("m2po_threshold",),
    ignores=("importance_sampling_level",),
)
GRPO_TYPES.enter(
    "clip_cov",
    GRPOType(clip_cov, token_mean, clip=ratio_range, collects=clip_terms),
    reads=(*CLIP, "delta", "cov_share", "clip_cov_low", "clip_cov_high"),
)
GRPO_TYPES.enter("kl_cov", GRPOType(kl_cov, token_mean, collects=clip_terms), reads=("cov_share", "kl_cov_coef"))
