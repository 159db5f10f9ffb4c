"""Every formula again, from its paper: float64, one sequence and one token at a time, nothing clever.

It imports torch and math only and shares no helper with `losses/`, so that a mistake would have to be made twice to
go unseen. Gradients come from autograd on these formulas.

Everywhere: a completion is a 1-D tensor of the log-probabilities (nats) of its scored tokens; a step is a list of
them; each loss returns the scalar loss of one whole optimizer step. Reference and old log-probabilities get no
gradient. Where the papers are silent: an example with nothing to score has no loss and still counts in the number of
examples, and an empty completion beside a full one has log-probability 0 and length 1.
"""

from logratio.reference.oracle._math import kl_estimate
from logratio.reference.oracle.advantages import (
    advantages,
    gpg,
    maxrl,
    normalize_then_sum,
    opo,
    passk,
    penalized,
    reinforce_pp,
    reinforce_pp_baseline,
    reinforce_pp_tokens,
    remax,
    rloo,
    rloo_std,
    total_rewards,
    whiten,
)
from logratio.reference.oracle.cpo import cpo, orpo, tpo
from logratio.reference.oracle.distillation import generalized_jsd
from logratio.reference.oracle.dpo import beta_dpo_next_mean, dpo
from logratio.reference.oracle.grpo import grpo
from logratio.reference.oracle.head import SequenceLogps, TokenLogps, sequence_logps, token_logps
from logratio.reference.oracle.kto import bco_next_state, kto
from logratio.reference.oracle.listwise import listwise
from logratio.reference.oracle.sft import sft

__all__ = [
    "SequenceLogps",
    "TokenLogps",
    "advantages",
    "bco_next_state",
    "beta_dpo_next_mean",
    "cpo",
    "dpo",
    "generalized_jsd",
    "grpo",
    "kl_estimate",
    "kto",
    "listwise",
    "normalize_then_sum",
    "gpg",
    "maxrl",
    "opo",
    "passk",
    "reinforce_pp_tokens",
    "rloo_std",
    "orpo",
    "penalized",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "rloo",
    "sequence_logps",
    "sft",
    "token_logps",
    "total_rewards",
    "tpo",
    "whiten",
]
