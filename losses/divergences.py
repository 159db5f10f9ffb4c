"""f-divergences in the place of DPO's reverse KL (Wang et al., arXiv 2309.16240)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .options import Variants, variant

if TYPE_CHECKING:
    from .dpo import DPOLoss

MAX_EXPONENT = 40.0
"""exp(40) squared is still finite in float32."""

F_DIVERGENCES: Variants[Callable[[Tensor, DPOLoss], Tensor]] = Variants()
"""f_divergence_type -> f'(u) of r = log u, [P]: what takes the place of r."""


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
