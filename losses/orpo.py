"""Odds Ratio Preference Optimization (Hong et al., arXiv 2403.07691): no reference model.

With a = mean log-probability of a completion's tokens and log odds(a) = a - log(1 - exp a):

    L = NLL(prompt and chosen completion) - beta log sigmoid(log odds(a_w) - log odds(a_l))        Eqs. 4 to 7

Differs from TRL 1.16: (1) the NLL is the token mean of the optimizer step, TRL's of the micro-batch;
(2) an average log-probability of exactly 0 has a finite loss and gradient, TRL's gradient is NaN.
As in TRL and the authors' code, the NLL covers the prompt too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .options import Positive
from .registry import register
from .token_metrics import preference_metrics
from .types import Kind, Loss, LossOutput, Mean, PairLogps, Totals, divide


def log_odds(average: Tensor) -> Tensor:
    """[C], a - log(1 - exp a). Log-averages above -eps are moved there: the odds of a certainty are infinite."""
    average = average.clamp(max=-torch.finfo(average.dtype).eps)
    return average - torch.log(-torch.expm1(average))


@register("orpo")
@dataclass(frozen=True, kw_only=True)
class ORPOLoss(Loss):
    """L = sum of NLL / N - beta sum of log sigmoid(log odds ratio) / P, both over the whole step.

    N: tokens of prompts and chosen completions; P: pairs.
    """

    kind: ClassVar[Kind] = Kind.PAIRED
    scores_prompt: ClassVar[bool] = True  # type: ignore[misc]

    beta: Positive = 0.1
    """Weight of the odds-ratio term (lambda in the paper)."""

    def __call__(self, policy: PairLogps, *, totals: Totals) -> LossOutput:
        """policy: chosen and rejected [P, T] each, and the prompt's log-probs, without which NLL is the chosen's.

        Raises ValueError or TypeError for shapes and dtypes that do not fit.
        """
        prompt_sum = 0.0 if policy.prompt is None else policy.prompt.sums
        nll = -(policy.chosen.sums + prompt_sum)
        chosen_average, rejected_average = policy.chosen.averages, policy.rejected.averages
        ratio = log_odds(chosen_average) - log_odds(rejected_average)
        odds_loss = -logsigmoid(ratio).where(policy.scored, ratio * 0)
        num_nll_tokens = totals.num_chosen_tokens + totals.num_prompt_tokens
        loss = divide(nll.sum(), num_nll_tokens) + self.beta * divide(odds_loss.sum(), totals.num_sequences)

        with torch.no_grad():
            metrics = preference_metrics(self.beta * chosen_average, self.beta * rejected_average, policy)
            tokens = policy.chosen.completion_mask.sum()
            if policy.prompt is not None:
                tokens = tokens + policy.prompt.completion_mask.sum()
            metrics["logps/chosen"] = Mean.of(chosen_average, policy.scored)  # averages, as in TRL
            metrics["logps/rejected"] = Mean.of(rejected_average, policy.scored)
            metrics["nll_loss"] = Mean(nll.detach().sum(), tokens)
            metrics["log_odds_chosen"] = Mean.of(ratio, policy.scored)
            metrics["log_odds_ratio"] = Mean.of(logsigmoid(ratio), policy.scored)
        return LossOutput(loss, metrics)
