"""Supervised fine-tuning: the negative log-likelihood of the completion, and its reweighted forms.

Differs from TRL 1.16: (1) TRL counts tokens over one gradient-accumulation window, we over the optimizer step, which
is the same thing for equal settings; (2) a row with nothing to score counts for nothing here and is dropped there;
(3) token weights, the z-loss, `eaft` and `asft` are not in TRL; (4) `gkd` is TRL's GKDTrainer at lmbda=0, of given
rows alone (what the model samples is distilled in GRPO), and has a temperature, which is there of sampling only.
Differs from the paper: (5) `eaft` takes the entropy of the whole vocabulary, the paper that of the 20 likeliest words
alone, over log 20 (its authors' code: over 3), so that weights above 1 are possible here; (6) `asft` has
KL(p_0 || p), as its authors' code has it and, by readers' notes, Eq. 6 of the paper's third version; the first is
quoted with KL(p || p_0). That code divides by the tokens of each micro-batch, and its weight is 0.1 where none is
given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .options import NotNegative, Positive, Share, Variants, variant
from .registry import register
from .token_metrics import TOKEN_METRICS, token_metrics
from .types import CompletionLogps, Divergence, Kind, Loss, LossOutput, Mean, Totals, divide

SFT_TYPES: Variants[Callable[[CompletionLogps, SFTLoss], Tensor]] = Variants()
"""loss_type -> the loss of each token, [C, T]."""


@variant(SFT_TYPES)
def nll(policy: CompletionLogps, loss: SFTLoss) -> Tensor:
    """-log p"""
    return -policy.logps


@variant(SFT_TYPES)
def dft(policy: CompletionLogps, loss: SFTLoss) -> Tensor:
    """-sg(p) log p, Dynamic Fine-Tuning (arXiv 2508.05629); its gradient is that of -p."""
    return -policy.logps.detach().exp() * policy.logps


@variant(SFT_TYPES, reads=("eaft_alpha",))
def eaft(policy: CompletionLogps, loss: SFTLoss) -> Tensor:
    """-sg(H / log 20)^alpha log p, H the entropy in nats, Entropy-Adaptive Fine-Tuning (arXiv 2601.02151).

    A token that the model is sure of hardly counts, right or wrong.
    """
    share = policy.needed("entropy").detach() / math.log(20)
    return -(share**loss.eaft_alpha) * policy.logps


@variant(SFT_TYPES, reads=("asft_alpha",))
def asft(policy: CompletionLogps, loss: SFTLoss) -> Tensor:
    """-sg(p) log p + alpha KL(p_0 || p), p_0 of the model that training starts from, Anchored SFT (arXiv 2509.23753).

    dft, held to what the model knew, with the KL over the whole vocabulary at every scored token.
    """
    return dft(policy, loss) + loss.asft_alpha * policy.needed("divergence")


@variant(SFT_TYPES, reads=("gkd_beta", "gkd_temperature"), ignores=("z_loss_coef",))
def gkd(policy: CompletionLogps, loss: SFTLoss) -> Tensor:
    """JSD(beta) of the teacher's and the model's next word, both at gkd_temperature, GKD (arXiv 2306.13649 Eq. 1).

    It does not look at the token: at every place that the rows come to, the model is to predict what the teacher does.
    """
    return policy.needed("divergence")


@register("sft")
@dataclass(frozen=True, kw_only=True)
class SFTLoss(Loss):
    """L = sum_t w_t (l(log p_t) + c (log Z_t)^2) / sum_t w_t over the whole step; nats, positive for `nll`.

    w: the tokens' weights, 1 where there are none. c (log Z)^2: the z-loss of PaLM (arXiv 2204.02311 Sec. 5).
    """

    kind: ClassVar[Kind] = Kind.SEQUENCE
    metric_stats: ClassVar[tuple[str, ...]] = TOKEN_METRICS  # type: ignore[misc]
    option_tables: ClassVar = {"loss_type": SFT_TYPES}

    loss_type: str = "nll"
    """nll, dft (Dynamic Fine-Tuning), eaft (Entropy-Adaptive Fine-Tuning), asft (Anchored SFT), or gkd (distillation
    from a teacher)."""
    eaft_alpha: NotNegative = 1.0
    """How much less a token weighs that the model is sure of; 0 is nll."""
    asft_alpha: NotNegative = 0.05
    """Weight of the KL from the model that training starts from; 0 is dft, with the KL still among the metrics."""
    gkd_beta: Share = 0.5
    """0: KL(teacher || model), forward, 1: KL(model || teacher), reverse; between, from their mixture of this share of
    the teacher, Jensen-Shannon at 0.5."""
    gkd_temperature: Positive = 1.0
    """Of both distributions."""
    z_loss_coef: NotNegative = 0.0
    """Weight of the square of log Z, which keeps logits from drifting (PaLM: 1e-4)."""

    @property
    def stats(self) -> tuple[str, ...]:
        """log Z, for the z-loss; the entropy, for eaft."""
        return (*(["log_z"] if self.z_loss_coef else []), *(["entropy"] if self.loss_type == "eaft" else []))

    @property
    def divergence(self) -> Divergence | None:
        """For gkd, and for asft, forward."""
        if self.loss_type == "gkd":
            return Divergence(self.gkd_beta, self.gkd_temperature, alone=True)
        return Divergence(0.0, 1.0, anchored=True) if self.loss_type == "asft" else None

    def __call__(self, policy: CompletionLogps, *, totals: Totals) -> LossOutput:
        """policy: [C, T]. Raises ValueError or TypeError for shapes and dtypes that do not fit."""
        per_token_loss, divergence = SFT_TYPES[self.loss_type](policy, self), self.divergence
        if self.z_loss_coef and not (divergence and divergence.alone):
            per_token_loss = per_token_loss + self.z_loss_coef * policy.needed("log_z") ** 2
        if policy.weights is not None:
            per_token_loss = per_token_loss * policy.needed("weights").detach()
        metrics = {"nll": Mean.of(-policy.logps, policy.completion_mask), **token_metrics(policy, predicted=policy)}
        if divergence and divergence.anchored:
            metrics["kl"] = Mean.of(policy.needed("divergence"), policy.completion_mask)
        by = totals.num_tokens if totals.sum_weights is None else totals.sum_weights
        return LossOutput(divide(policy.masked(per_token_loss).sum(), by), metrics)
