"""Pairs without a reference model: CPO and its relatives, TPO, ORPO."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from logratio.reference.oracle._math import relu, smoothed, softplus, token_mean, zero


def cpo(
    chosen: Sequence[Tensor],
    rejected: Sequence[Tensor],
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    cpo_alpha: float | None = None,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
) -> Tensor:
    """Mean over pairs, plus cpo_alpha (None: 1, for simper 0) times the token mean of -log p over the chosen.

    s is the sum of the completion's log-probabilities for sigmoid and hinge, its average for the others; where alpha is
    not 0, s becomes (1 - p^-alpha) / alpha with p = e^s (AlphaPO, arXiv 2501.03884).
    """
    total = zero([*chosen, *rejected])
    for y_w, y_l in zip(chosen, rejected, strict=True):
        if len(y_w) + len(y_l) == 0:
            continue
        s_w, s_l = y_w.sum(), y_l.sum()
        if loss_type not in ("sigmoid", "hinge"):
            s_w, s_l = s_w / max(len(y_w), 1), s_l / max(len(y_l), 1)
        if alpha:
            s_w, s_l = -torch.expm1(-alpha * s_w) / alpha, -torch.expm1(-alpha * s_l) / alpha
        if loss_type == "sigmoid":  # arXiv 2401.08417 Eq. 3
            loss = smoothed(beta * (s_w - s_l), label_smoothing)
        elif loss_type == "hinge":  # arXiv 2305.10425 with its margin at 1 / beta
            loss = relu(1 - beta * (s_w - s_l))
        elif loss_type == "ipo":  # arXiv 2310.12036 Eq. 17, the reference uniform
            loss = (s_w - s_l - 1 / (2 * beta)) ** 2
        elif loss_type in ("simpo", "alphapo"):  # arXiv 2405.14734; 2501.03884 by `alpha`
            loss = smoothed(beta * (s_w - s_l) - simpo_gamma, label_smoothing)
        elif loss_type == "simper":  # arXiv 2502.00883: the inverse perplexities
            loss = torch.exp(s_l) - torch.exp(s_w)
        else:
            raise ValueError(f"no formula for CPO's loss_type={loss_type!r}")
        total = total + loss
    if cpo_alpha is None:
        cpo_alpha = 0.0 if loss_type in ("alphapo", "simper") else 1.0  # AlphaPO and SimPER have no NLL
    return total / max(len(chosen), 1) + cpo_alpha * token_mean(chosen)


def tpo(
    chosen: Sequence[Tensor],
    rejected: Sequence[Tensor],
    gold: Sequence[Tensor],
    *,
    beta: float = 0.01,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    tpo_alpha: float = 1.0,
    tpo_l_gamma: float = 0.5,
) -> Tensor:
    """Mean over pairs, plus tpo_alpha times the token mean of -log p of the gold answers (arXiv 2405.16681 Sec. 3)."""
    total = zero([*chosen, *rejected, *gold])
    for y_w, y_l in zip(chosen, rejected, strict=True):
        if len(y_w) + len(y_l) == 0:
            continue
        difference_of_sums = y_w.sum() - y_l.sum()
        difference_of_averages = y_w.sum() / max(len(y_w), 1) - y_l.sum() / max(len(y_l), 1)
        if loss_type == "sigmoid":
            loss = smoothed(beta * difference_of_sums, label_smoothing)
        elif loss_type == "hinge":
            loss = relu(1 - beta * difference_of_sums)
        elif loss_type == "ipo":
            loss = (difference_of_averages - 1 / (2 * beta)) ** 2
        elif loss_type == "tpo-l":
            loss = smoothed(beta * difference_of_averages - tpo_l_gamma, label_smoothing)
        else:
            raise ValueError(f"no formula for TPO's loss_type={loss_type!r}")
        total = total + loss
    return total / max(len(chosen), 1) + tpo_alpha * token_mean(gold)


def orpo(
    prompt_logps: Sequence[Tensor], chosen: Sequence[Tensor], rejected: Sequence[Tensor], *, beta: float = 0.1
) -> Tensor:
    """L_SFT + beta L_OR (arXiv 2403.07691 Eq. 6); L_SFT is the token mean over prompts and chosen completions.

    Raises ValueError where one completion of a pair is empty: its odds are not defined.
    """
    nll, tokens, odds_loss = zero(chosen), 0, zero(chosen)
    for prompt, y_w, y_l in zip(prompt_logps, chosen, rejected, strict=True):
        nll = nll - prompt.sum() - y_w.sum()
        tokens += len(prompt) + len(y_w)
        if len(y_w) + len(y_l) == 0:
            continue
        if len(y_w) == 0 or len(y_l) == 0:
            raise ValueError("ORPO's odds of an empty completion are not defined")
        log_odds_ratio = _log_odds(y_w) - _log_odds(y_l)  # Eq. 5
        odds_loss = odds_loss + softplus(-log_odds_ratio)  # -log sigmoid(.), Eq. 7
    return nll / max(tokens, 1) + beta * odds_loss / max(len(chosen), 1)


def _log_odds(logps: Tensor) -> Tensor:
    """log(P / (1 - P)), P the exponential of the mean log-probability: arXiv 2403.07691 Eqs. 3, 4."""
    average = logps.sum() / len(logps)
    return average - torch.log(-torch.expm1(average))
