"""Direct Preference Optimization (Rafailov et al., arXiv 2305.18290) and its variants.

With r_w, r_l the log-ratios of chosen and rejected to the reference, summed over completion tokens
(EOS included), a variant is one function of them: `PairRatios, DPOLoss -> loss of each pair`. To add one:

    @variant(DPO_TYPES)
    def my_loss(r: PairRatios, loss: DPOLoss) -> Tensor:
        return ...

and it is trained by `--loss_type my_loss`, and held to the laws and to its oracle by the tests.

Differs from TRL 1.16: (1) the mean is over the pairs of the optimizer step, not of the micro-batch;
(2) `ipo` divides by scored tokens, TRL by the unshifted mask: the same number wherever there is a prompt.
Differs from the paper: `ipo` averages over tokens, as its authors recommended to TRL (pull request 1265).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

from .types import (
    Kind,
    Loss,
    LossOutput,
    Mean,
    PairLogps,
    Totals,
    check_choice,
    check_positive,
    divide,
    register,
    variant,
)


class PairRatios(NamedTuple):
    """chosen, rejected: [P] summed log-ratios in nats; *_lengths: [P] scored tokens, at least 1."""

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def margin(self) -> Tensor:
        """[P], r_w - r_l"""
        return self.chosen - self.rejected


DPO_TYPES: dict[str, Callable[[PairRatios, DPOLoss], Tensor]] = {}
"""loss_type -> the loss of each pair, [P], nats."""


@variant(DPO_TYPES)
def sigmoid(r: PairRatios, loss: DPOLoss) -> Tensor:
    """-log sigmoid(beta (r_w - r_l)), arXiv 2305.18290 Eq. 7."""
    return -logsigmoid(loss.beta * r.margin)


@variant(DPO_TYPES)
def hinge(r: PairRatios, loss: DPOLoss) -> Tensor:
    """max(0, 1 - beta (r_w - r_l)), the normalised hinge of RSO (arXiv 2309.06657) after SLiC (2305.10425)."""
    return (1 - loss.beta * r.margin).relu()


@variant(DPO_TYPES)
def ipo(r: PairRatios, loss: DPOLoss) -> Tensor:
    """(r_w/|y_w| - r_l/|y_l| - 1/(2 beta))^2, arXiv 2310.12036 Eq. 17, averaged over tokens."""
    return (r.chosen / r.chosen_lengths - r.rejected / r.rejected_lengths - 1 / (2 * loss.beta)) ** 2


@register("dpo")
@dataclass(frozen=True, kw_only=True)
class DPOLoss(Loss):
    """L = sum over pairs of l(r_w, r_l) / P, P the pairs of the whole step."""

    kind: ClassVar[Kind] = Kind.PAIRED
    uses_reference: ClassVar[bool] = True

    beta: float = 0.1
    """Strength of the pull towards the reference (1 / nats); tau in ipo."""
    loss_type: str = "sigmoid"
    """sigmoid, hinge, or ipo."""

    def __post_init__(self) -> None:
        check_choice("loss_type", self.loss_type, DPO_TYPES)
        check_positive("beta", self.beta)

    def __call__(self, policy: PairLogps, ref: PairLogps, *, totals: Totals) -> LossOutput:
        """policy, ref: chosen and rejected [P, T] each. `ref` gets no gradient.

        Raises ValueError or TypeError for shapes and dtypes that do not fit.
        """
        policy.chosen.check_like(tokens=False, ref=ref.chosen)
        r = PairRatios(
            policy.chosen.sums - ref.chosen.sums.detach(),
            policy.rejected.sums - ref.rejected.sums.detach(),
            policy.chosen.lengths.clamp(min=1),
            policy.rejected.lengths.clamp(min=1),
        )
        scored = policy.scored  # a pair with both sides wholly masked has nothing to say, and no loss
        per_pair_loss = DPO_TYPES[self.loss_type](r, self).where(scored, r.margin * 0)
        metrics = preference_metrics(self.beta * r.chosen, self.beta * r.rejected, policy)
        return LossOutput(divide(per_pair_loss.sum(), totals.num_sequences), metrics)


def preference_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor, policy: PairLogps) -> dict[str, Mean]:
    """TRL's names: implicit rewards [P] of chosen and rejected, how often and by how much chosen wins, log-probs."""
    values = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": policy.chosen.sums,
        "logps/rejected": policy.rejected.sums,
    }
    return {name: Mean.of(value, policy.scored) for name, value in values.items()}
