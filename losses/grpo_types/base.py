"""What a variant of GRPO is made of, and the tables that `GRPOLoss` looks its parts up in."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..options import Variants
from ..types import Totals

if TYPE_CHECKING:
    from ..grpo import GRPOLoss


class Ratios(NamedTuple):
    """What a surrogate sees.

    ratio: rho, [C, T], or [C, 1] at sequence level. log_ratio: log p - log p_old, [C, T], 0 where masked.
    logps: [C, T], 0 where masked. advantages: [C, 1], or [C, T] with 0 where masked. lengths: scored tokens, at least
    1, [C, 1]. kept: [C, T] bool, scored tokens that the policy term is meant for (`top_entropy_quantile`).
    prompt_tokens: [C, 1], scored tokens of all completions of the same prompt; None where nobody asked.
    prompts: [C, 1], a number for each prompt of the step; ref_logps: [C, T], 0 where masked; None where nobody asked.
    weight: of the sampling correction, [C, T] or [C, 1], None without one. log_sampled: log p - log mu, [C, T].
    step: [n, k], what the loss_type's `collects` gave of the whole step, in its first columns; None without one.
    """

    ratio: Tensor
    log_ratio: Tensor
    logps: Tensor
    advantages: Tensor
    lengths: Tensor
    kept: Tensor
    prompt_tokens: Tensor | None = None
    prompts: Tensor | None = None
    weight: Tensor | None = None
    log_sampled: Tensor | None = None
    step: Tensor | None = None
    ref_logps: Tensor | None = None

    @property
    def from_sampler(self) -> Tensor:
        """log p - log mu, or log rho where nobody says what sampled, [C, T]; its gradient is that of log p."""
        if self.log_sampled is None:
            return self.log_ratio
        return self.log_sampled + (self.log_ratio - self.log_ratio.detach())


Weight = Callable[[Ratios, Totals, "GRPOLoss"], Tensor]
"""(x, totals, loss) -> what a token's loss is multiplied by, [C, 1] or scalar."""


class GRPOType(NamedTuple):
    """surrogate(x, loss) -> [C, T] or [C, 1]; weight: the normaliser, where no `loss_aggregation` is asked for.

    sequence_term: the surrogate is of the whole completion (it selects the `kept` tokens itself, and the KL term is
    not corrected by rho). epsilon, epsilon_high: the defaults, None: the same as epsilon. widest: epsilon is below it.
    clip(x, loss) -> what is clipped, [C, T] or [C, 1], and its range; None where nothing is, and no metrics of it.
    corrected: the levels of sampling corrections that it may be multiplied by. weighs: the surrogate does it itself.
    of_tokens: tokens of a completion may have different advantages.
    collects(x, loss) -> what the surrogate compares with of the whole step: [C, T, k], of which scored tokens count, or
    [C, k], of completions; None: nothing. by_prompt: it is called with the `prompts`. to_reference: with `ref_logps`.
    """

    surrogate: Callable[[Ratios, GRPOLoss], Tensor]
    weight: Weight
    sequence_term: bool = False
    epsilon: float = 0.2
    epsilon_high: float | None = None
    widest: float = 1.0
    clip: Callable[[Ratios, GRPOLoss], tuple[Tensor, float, float]] | None = None
    corrected: Collection[str] = ("token", "sequence", "geometric", "probability")
    weighs: bool = False
    of_tokens: bool = True
    collects: Callable[[Ratios, GRPOLoss], Tensor] | None = None
    by_prompt: bool = False
    to_reference: bool = False


GRPO_TYPES: Variants[GRPOType] = Variants()
"""loss_type -> its parts."""

LOSS_AGGREGATIONS: Variants[Weight] = Variants()
"""loss_aggregation -> the normaliser, whatever the surrogate."""

LEVELS: Variants[Callable[[Tensor, Tensor], Tensor]] = Variants()
"""importance_sampling_level -> log rho of (log p - log p_old [C, T], lengths [C, 1]): [C, T] or [C, 1]."""

KL_ESTIMATORS: Variants[Callable[[Tensor], Tensor]] = Variants()
"""kl_estimator -> k(d) of d = log p - log p_ref, elementwise (Schulman, "Approximating KL divergence")."""
