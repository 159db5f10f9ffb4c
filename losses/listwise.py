"""Losses of whole lists: a prompt, K >= 2 completions, and a reward for each.

With r_i the log-ratio of completion i to the reference, summed over its tokens (EOS included), and s_i = beta r_i its
score, a list has two distributions over its completions: the policy's p = softmax(s) and the rewards' q = softmax(R /
temperature_alpha). A variant is one function of scores and rewards, whose terms add up to the loss of a list. K may
differ from list to list, and the order within a list does not matter.

At K = 2 three of them are losses of pairs: `plackett_luce` is DPO's sigmoid; `infonca` is cdpo, and `exo_rw` exo_pair,
whose label_smoothing is q of the worse completion; `nca` is nca_pair where that q is 0.

Differs from TRL 1.16: it has none of them.
Differs from the papers or their authors' code: (1) `plackett_luce` says nothing of which of two completions with equal
rewards comes first, which a ranking needs to know: both are compared with what has less; (2) the mean is over lists, as
in the papers, and NCA's code adds 0.01 to the reward of the first completion of each list, to break ties, which is left
out; (3) temperature_alpha is that of NCA's code, 1 / alpha of its paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence

from .options import Positive, Variants, variant
from .registry import register
from .token_metrics import token_metrics
from .types import CompletionLogps, Kind, Loss, LossOutput, Mean, Totals, divide

ABSENT = -1e30
"""Score and reward of a place without a completion: less than any other, and makes no NaN."""


class Lists(NamedTuple):
    """What a variant sees of E lists of at most K completions, [E, K] each; only the scores carry a graph.

    scores: beta r, in nats. rewards: any finite numbers, more is better. present: bool, False where a list has fewer
    completions than K; what a variant gives there is not read.
    """

    scores: Tensor
    rewards: Tensor
    present: Tensor

    def log_q(self, loss: ListwiseLoss) -> Tensor:
        """[E, K], log softmax(R / temperature_alpha) over a list."""
        return (self.rewards / loss.temperature_alpha).log_softmax(-1)


LISTWISE_TYPES: Variants[Callable[[Lists, ListwiseLoss], Tensor]] = Variants()
"""loss_type -> terms [E, K], nats, whose sum over a list is its loss."""


@variant(LISTWISE_TYPES, reads=("temperature_alpha",))
def infonca(x: Lists, loss: ListwiseLoss) -> Tensor:
    """-sum_i q_i log p_i, InfoNCA, arXiv 2402.05369: the cross-entropy of two distributions over the list."""
    return -x.log_q(loss).exp() * x.scores.log_softmax(-1)


@variant(LISTWISE_TYPES, reads=("temperature_alpha",))
def nca(x: Lists, loss: ListwiseLoss) -> Tensor:
    """-sum_i (q_i log sigmoid(s_i) + log sigmoid(-s_i) / K), NCA, arXiv 2402.05369: s_i has a finite optimum.

    There sigmoid(s_i) = q_i / (q_i + 1/K), whatever the others do: the best one's likelihood need not fall with theirs.
    """
    count = x.present.sum(-1, keepdim=True)
    return -x.log_q(loss).exp() * logsigmoid(x.scores) - logsigmoid(-x.scores) / count


@variant(LISTWISE_TYPES, reads=("temperature_alpha",))
def exo_rw(x: Lists, loss: ListwiseLoss) -> Tensor:
    """sum_i p_i (log p_i - log q_i), EXO with rewards, arXiv 2402.00856: KL(p || q), which seeks a mode of q.

    `exo-rw` of the authors' code: beta is its beta_pi, temperature_alpha its beta_r.
    """
    log_p = x.scores.log_softmax(-1)
    return log_p.exp() * (log_p - x.log_q(loss))


@variant(LISTWISE_TYPES)
def plackett_luce(x: Lists, loss: ListwiseLoss) -> Tensor:
    """-sum_i log(exp s_i / sum of exp s_j over j = i and all R_j < R_i), DPO of rankings, arXiv 2305.18290.

    Each completion is the first choice among itself and those with a lesser reward; only the order of rewards is read.
    """
    itself = torch.eye(x.scores.shape[1], dtype=torch.bool, device=x.scores.device)
    others = x.rewards[:, None, :] < x.rewards[:, :, None]
    left = x.scores[:, None, :].masked_fill(~(others | itself), ABSENT)
    return left.logsumexp(-1) - x.scores


@register("listwise")
@dataclass(frozen=True, kw_only=True)
class ListwiseLoss(Loss):
    """L = sum over lists of sum_i l_i / B, B the lists of the whole step."""

    kind: ClassVar[Kind] = Kind.LISTED
    wants_reference: ClassVar[bool] = True  # type: ignore[misc]
    metric_stats: ClassVar[tuple[str, ...]] = ("entropy",)  # type: ignore[misc]
    option_tables: ClassVar = {"loss_type": LISTWISE_TYPES}

    beta: Positive = 0.1
    """Strength of the pull towards the reference (1 / nats)."""
    loss_type: str = "infonca"
    """infonca, nca, exo_rw, or plackett_luce."""
    temperature_alpha: Positive = 1.0
    """What rewards are divided by before their softmax: the difference of two rewards that counts as a nat."""

    def __call__(
        self, policy: CompletionLogps, ref: CompletionLogps, rewards: Tensor, sizes: Sequence[int], *, totals: Totals
    ) -> LossOutput:
        """policy, ref: [C, T], the completions of one list after the other; rewards: [C], finite; sizes: [E], how many
        completions each list has. `ref` and rewards get no gradient.

        A completion with nothing scored has r = 0, as an empty one; a list of such completions alone has no loss.
        Raises ValueError or TypeError for shapes and dtypes that do not fit.
        """
        policy.check_like(tokens=False, ref=ref)
        if rewards.shape != policy.sums.shape or not rewards.is_floating_point():
            count = len(policy.completion_mask)
            raise ValueError(f"rewards must be floating point [{count}], got {rewards.dtype} {list(rewards.shape)}")
        if sum(sizes) != len(rewards) or any(size < 2 for size in sizes):
            raise ValueError(f"sizes must be 2 or more and add up to the {len(rewards)} completions, got {list(sizes)}")
        r = self.beta * (policy.sums - ref.sums.detach())
        x = Lists(padded(r, sizes), padded(rewards.detach().to(r), sizes), padded(torch.ones_like(r), sizes) > 0)
        scored = (padded(policy.completion_mask.any(-1).to(r), sizes) > 0).any(-1)
        terms = LISTWISE_TYPES[self.loss_type](x, self).where(x.present, 0.0)
        loss = divide(terms.sum(-1).where(scored, 0.0).sum(), totals.num_sequences)
        return LossOutput(loss, list_metrics(x, padded(policy.sums, sizes), scored) | token_metrics(policy))


def padded(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """[C] of lists of these sizes, one after the other, as [E, K], `ABSENT` behind the end of a list."""
    return pad_sequence(list(values.split(list(sizes))), batch_first=True, padding_value=ABSENT)


@torch.no_grad()
def list_metrics(x: Lists, logps: Tensor, scored: Tensor) -> dict[str, Mean]:
    """TRL's names of pairs, and at K = 2 the same numbers: chosen is a list's best completion by its reward, rejected
    its worst, the mean of several that are equal; accuracies are of all pairs with different rewards.

    Of lists whose rewards are all equal there is only their share, frac_reward_zero_std, as of GRPO's groups.
    """
    most = x.rewards.amax(-1, keepdim=True)
    least = x.rewards.where(x.present, most).amin(-1, keepdim=True)
    differs = (most > least)[:, 0] & scored
    ends = {"chosen": x.rewards == most, "rejected": x.rewards == least}

    def of(values: Tensor, end: str) -> Tensor:
        return values.where(ends[end], 0.0).sum(-1) / ends[end].sum(-1)

    better = (x.rewards[:, :, None] > x.rewards[:, None, :]) & x.present[:, None, :] & scored[:, None, None]
    won = (x.scores[:, :, None] > x.scores[:, None, :]).to(x.scores.dtype)
    best, worst = of(x.scores, "chosen"), of(x.scores, "rejected")
    return {
        "rewards/chosen": Mean.of(best, differs),
        "rewards/rejected": Mean.of(worst, differs),
        "rewards/accuracies": Mean.of(won, better),
        "rewards/margins": Mean.of(best - worst, differs),
        "logps/chosen": Mean.of(of(logps, "chosen"), differs),
        "logps/rejected": Mean.of(of(logps, "rejected"), differs),
        "frac_reward_zero_std": Mean.of((~differs).to(x.scores.dtype), scored),
    }
