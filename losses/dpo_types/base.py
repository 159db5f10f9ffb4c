"""What a variant of DPO is made of, and the table that `DPOLoss` looks them up in."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..options import Variants
from ..types import Totals

if TYPE_CHECKING:
    from ..dpo import DPOLoss


class PairRatios(NamedTuple):
    """What a variant sees of P pairs, [P] each, in nats; only the policy's own log-probs carry a graph.

    chosen, rejected: log-ratios r summed over tokens, or f'(exp r) where an f-divergence is chosen.
    chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: the summed log-probs behind them.
    chosen_nll: -log p summed over the chosen tokens, whatever `ld_alpha` and `down_sample` are.
    chosen_lengths, rejected_lengths: scored tokens, at least 1.
    given: the pairs' `PairLogps.margin`, where they have any.
    ref_entropy: the reference's, of a token in the mean, where a variant reads it.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_nll: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    given: Tensor | None
    ref_entropy: Tensor | None
    totals: Totals

    @property
    def margin(self) -> Tensor:
        """[P], r_w - r_l"""
        return self.chosen - self.rejected

    @property
    def average_margin(self) -> Tensor:
        """[P], r_w / |y_w| - r_l / |y_l|"""
        return self.chosen / self.chosen_lengths - self.rejected / self.rejected_lengths


class DPOType(NamedTuple):
    """divergences: other f-divergences fit the formula. whole_step: it needs `collected` of the whole step.

    margin: it reads the pairs' margins. averages: it divides sums by their lengths, which leaves no use for
    `down_sample`. ref_entropy: it reads the reference's. pairwise: what it returns of a pair is a loss of it alone.
    """

    formula: Callable[[PairRatios, DPOLoss], Tensor]
    divergences: bool = False
    whole_step: bool = False
    margin: bool = False
    averages: bool = False
    ref_entropy: bool = False
    pairwise: bool = True


DPO_TYPES: Variants[DPOType] = Variants()
"""loss_type -> the loss of each pair, [P], nats."""

Formula = Callable[[PairRatios, "DPOLoss"], Tensor]


def dpo_type(
    *, reads: Collection[str] = (), ignores: Collection[str] = (), **flags: bool
) -> Callable[[Formula], Formula]:
    """Function decorator: enter a formula into `DPO_TYPES` under its own name; see `DPOType` and `Variants.enter`."""

    def add(formula: Formula) -> Formula:
        entry = DPOType(formula, **flags)
        own = ["f_divergence_type"] if entry.divergences and "f_divergence_type" not in ignores else []
        unused = ["down_sample"] if entry.averages else []
        DPO_TYPES.enter(formula.__name__, entry, reads=[*reads, *own], ignores=[*ignores, *unused])
        return formula

    return add
