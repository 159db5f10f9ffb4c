"""Supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from logratio.reference.oracle._math import zero


def sft(
    logps: Sequence[Tensor],
    *,
    weights: Sequence[Tensor] | None = None,
    log_z: Sequence[Tensor] | None = None,
    entropy: Sequence[Tensor] | None = None,
    divergence: Sequence[Tensor] | None = None,
    loss_type: str = "nll",
    eaft_alpha: float = 1.0,
    asft_alpha: float = 0.05,
    z_loss_coef: float = 0.0,
) -> Tensor:
    """sum_t w_t l_t / sum_t w_t over the step, w = 1 without `weights`, 0 where they sum to 0.

    l = -log p (`nll`), -sg(p) log p (`dft`, arXiv 2508.05629) or -sg(H / ln 20)^alpha log p (`eaft`, arXiv
    2601.02151, H the token's entropy), or that of `dft` and asft_alpha times the token's `divergence`, KL(p_0 || p)
    with p_0 the model at the start (`asft`, arXiv 2509.23753 Eq. 6); plus z_loss_coef (log Z)^2 (arXiv 2204.02311
    Sec. 5). Or the token's `divergence` from a teacher (`gkd`, arXiv 2306.13649). Both are `generalized_jsd`.
    """
    total, divisor = zero(logps), 0.0
    for i, sequence in enumerate(logps):
        for t, logp in enumerate(sequence):
            weight = 1.0 if weights is None else float(weights[i][t])
            if loss_type == "nll":
                token_loss = -logp
            elif loss_type == "dft":
                token_loss = -math.exp(float(logp.detach())) * logp
            elif loss_type == "eaft":
                if entropy is None:
                    raise ValueError("loss_type='eaft' needs entropy")
                token_loss = -((float(entropy[i][t].detach()) / math.log(20)) ** eaft_alpha) * logp
            elif loss_type == "asft":
                if divergence is None:
                    raise ValueError("loss_type='asft' needs divergence")
                token_loss = -math.exp(float(logp.detach())) * logp + asft_alpha * divergence[i][t]
            elif loss_type == "gkd":
                if divergence is None:
                    raise ValueError("loss_type='gkd' needs divergence")
                token_loss = divergence[i][t]
            else:
                raise ValueError(f"no formula for SFT's loss_type={loss_type!r}")
            if z_loss_coef:
                if log_z is None:
                    raise ValueError(f"z_loss_coef={z_loss_coef} needs log_z")
                token_loss = token_loss + z_loss_coef * log_z[i][t] ** 2
            total = total + weight * token_loss
            divisor += weight
    return total / divisor if divisor else total
