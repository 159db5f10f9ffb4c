"""The optimal token baseline: what is taken off the advantage, at each place of a prompt's completions another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import CompletionLogps
from .base import Ratios

LONGEST = 20
"""Bits for the place of a token in its completion; a prompt's number has the other 43."""


def path_variances(policy: CompletionLogps) -> Tensor:
    """W [C, T] float64, W_t = sum_{j <= t} (1 - 2 p_j + sum_v p_v^2): of the completion's tokens up to this one the
    squared norms of the gradients of log p in the logits."""
    p, p2 = policy.logps.double().exp(), policy.needed("log_sum_p2").double().exp()
    return policy.masked((1 - 2 * p + p2).clamp(min=0)).cumsum(-1)


def baseline_terms(policy: CompletionLogps, x: Ratios) -> Tensor:
    """[C, T, 4] float64: the prompt, the token's place among the scored ones, W, and W A."""
    assert x.prompts is not None
    place, w = policy.completion_mask.cumsum(-1).double(), path_variances(policy)
    return torch.stack(torch.broadcast_tensors(x.prompts.double(), place, w, w * x.advantages), -1)


def without_baseline(policy: CompletionLogps, x: Ratios, step: Tensor | None) -> Tensor:
    """A - B [C, T], 0 where masked, B = sum_i W_it A_i / sum_i W_it over the prompt's completions that have a token t:
    the optimal token baseline, arXiv 2602.07078, with its proxy for the norm of a token's gradient.

    Readings: (1) of A, which differs from the reward by what all of a prompt's completions have in common, it is the
    same as of the reward; with a std, over this; (2) where one completion alone has a token t there is nothing to
    compare with, and A stays: in verl, whose A is the reward, the reward; (3) p is of the step's beginning, in verl of
    the rollouts', which differ from the second step on them; (4) t counts scored tokens.
    """
    assert step is not None
    assert x.prompts is not None
    table = torch.cat([step[:, 2:4], torch.ones_like(step[:, :1])], -1)
    keys, own = token_keys(step[:, 0], step[:, 1]), token_keys(x.prompts, policy.completion_mask.cumsum(-1))
    ordered = keys.sort().values  # the first of its equals is where the sum of these stands
    sums = step.new_zeros(len(step) + 1, 3).index_add(0, torch.searchsorted(ordered, keys), table)
    w, wa, count = sums[torch.searchsorted(ordered, own)].unbind(-1)
    baseline = torch.where(count > 1, wa / w.clamp(min=torch.finfo(w.dtype).tiny), 0.0)
    return policy.masked((x.advantages - baseline).to(x.advantages.dtype))


def token_keys(prompts: Tensor, places: Tensor) -> Tensor:
    """int64, a number for each place of each prompt."""
    return (prompts.long() << LONGEST) + places.long()
