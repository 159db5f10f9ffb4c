"""Advantages of several kinds at once, of several reward functions, and of one's own formula."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logratio.losses.advantages import (
    Advantage,
    Context,
    advantages_of,
    normalize,
    normalize_then_sum,
    sum_then_normalize,
)
from logratio.reference import oracle

from ._advantages import NAN, ONE, close, lists, steps, tensor


def test_a_sum_of_several():
    got = advantages_of(ONE, ["rloo", "group"], weights=[0.7, 0.3], scale="none")
    close(got, 0.7 * tensor([-2.0, 2.0], [0.0, 0.0]) + 0.3 * tensor([-1.0, 1.0], [0.0, 0.0]), 1e-14, 0)
    close(advantages_of(ONE, ["rloo", "rloo"]), 2 * advantages_of(ONE, "rloo"), 0, 0)
    for weight in (0.5, 2.0):
        close(advantages_of(ONE, ["rloo"], weights=[weight]), weight * advantages_of(ONE, "rloo"), 0, 0)
    whitened = advantages_of(ONE, ["rloo", "group"], scale="none", normalize_advantages=True)
    close(whitened, normalize(tensor([-3.0, 3.0], [0.0, 0.0])))
    with pytest.raises(ValueError, match="^1 weights for 2 advantage types$"):
        advantages_of(ONE, ["rloo", "group"], weights=[1.0])


def test_what_has_no_advantage_of_one_type_has_that_of_the_other():
    """ReMax has one where the group has none; what has neither does not count in the whitening."""
    rewards, given = tensor([1.0, NAN], [NAN, NAN], [3.0, 0.0]), {"baseline": tensor([0.0], [0.0], [1.0])}
    close(advantages_of(rewards, ["rloo", "remax"], **given), tensor([1.0, 0.0], [0.0, 0.0], [5.0, -4.0]), 0, 0)
    got = advantages_of(rewards, ["rloo", "remax"], normalize_advantages=True, **given)
    close(got, normalize(tensor([1.0, NAN], [NAN, NAN], [5.0, -4.0])).nan_to_num(0.0))


@pytest.mark.parametrize("kind", ["group", "reinforce_pp_tokens"])
def test_what_has_no_reward_does_not_count_in_the_whitening(kind):
    """Nor where the others of its group are all equal."""
    rewards, none = tensor([1.0, 1.0, 0.0], [0.0, 0.0, 0.0]), tensor([NAN], [NAN])
    alone, more = (
        advantages_of(x, [kind, "gpg"], lengths=torch.ones(x.shape), normalize_advantages=True)
        for x in (rewards, torch.cat([rewards, none], 1))
    )
    close(more, torch.cat([alone, torch.zeros(2, 1)], 1), 1e-12, 0)


# Of one's own ---------------------------------------------------------------------------------------------------------


def own(formula: Any) -> Advantage:
    return Advantage(formula, 2, False, False)


def test_an_own_formula():
    def squared(rewards: Tensor, context: Context) -> Tensor:
        return rewards.square()

    close(advantages_of(ONE, own(squared)), ONE.square(), 0, 0)
    close(advantages_of(ONE, [own(squared), "rloo"], weights=[2, 1]), 2 * ONE.square() + advantages_of(ONE, "rloo"))
    assert not advantages_of(ONE.clone().requires_grad_(), own(squared)).requires_grad


def test_an_own_formula_of_tokens():
    """[groups, G, T]; whitened over tokens, of which NaN are none; added to what is of completions."""

    def by_token(rewards: Tensor, context: Context) -> Tensor:
        places = torch.arange(3.0, dtype=torch.float64)
        return torch.where(places < context.lengths[..., None], rewards[..., None] + places, torch.nan)

    lengths = torch.tensor([[3, 1], [2, 2]])
    got = advantages_of(ONE, own(by_token), lengths=lengths)
    assert got.tolist() == [[[1, 2, 3], [3, 0, 0]], [[0, 1, 0], [0, 1, 0]]]
    both = advantages_of(ONE, [own(by_token), "rloo"], lengths=lengths)
    assert both[0].tolist() == [[-1, 0, 1], [5, 2, 2]]
    whitened = advantages_of(ONE, own(by_token), lengths=lengths, normalize_advantages=True)
    known = torch.tensor([1, 2, 3, 3, 0, 1, 0, 1], dtype=torch.float64)
    expected = (known - known.mean()) / (known.std() + 1e-4)
    close(whitened[0].flatten(), torch.cat([expected[:4], torch.zeros(2, dtype=torch.float64)]))


def test_an_own_formula_that_gives_something_else_is_named():
    def flat(rewards: Tensor, context: Context) -> Any:
        return rewards.flatten()

    def nothing(rewards: Tensor, context: Context) -> Any:
        return None

    def infinite(rewards: Tensor, context: Context) -> Tensor:
        return rewards / 0

    must = r"must return \[2, 2\], or that with one a token behind it, got"
    with pytest.raises(ValueError, match=rf"^flat {must} \[4\]$"):
        advantages_of(ONE, own(flat))
    with pytest.raises(ValueError, match=rf"^nothing {must} NoneType$"):
        advantages_of(ONE, own(nothing))
    with pytest.raises(ValueError, match="^infinite returned an infinite advantage$"):
        advantages_of(ONE, own(infinite))


# Of several reward functions ------------------------------------------------------------------------------------------


def test_several_rewards_by_hand():
    """The second function says 0, 10 | nothing, 4; its weight is 1/2."""
    by_function = torch.stack([ONE, tensor([0.0, 10.0], [NAN, 4.0])], -1)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    assert sum_then_normalize(by_function, weights).tolist() == [[1.0, 8.0], [0.0, 2.0]]
    first, second = 1 / (math.sqrt(2) + 1e-4), 5 / (math.sqrt(50) + 1e-4)
    both = first + second / 2
    wanted = tensor([-both, both], [0.0, 0.0])
    close(normalize_then_sum(by_function, weights), wanted)
    close(
        advantages_of(normalize_then_sum(by_function, weights), "reinforce_pp"),
        wanted / (both * math.sqrt(2 / 3) + 1e-4),
    )


@settings(max_examples=20, deadline=None)
@given(step=steps(missing=True))
def test_several_rewards_are_the_oracles(step):
    first, second = step["rewards"], step["rewards"].flip(0).square()
    weights, by_function = [1.0, 0.25], [lists(first), lists(second)]
    columns = (torch.stack([first, second], -1), torch.tensor(weights, dtype=torch.float64))
    summed = oracle.total_rewards(by_function, weights)
    close(
        sum_then_normalize(*columns).nan_to_num(-7.0), tensor(*[[-7.0 if x is None else x for x in r] for r in summed])
    )
    gdpo = advantages_of(normalize_then_sum(*columns), "reinforce_pp")
    close(gdpo, tensor(*oracle.normalize_then_sum(by_function, weights)), 1e-7, 1e-7)


@settings(max_examples=20, deadline=None)
@given(step=steps(missing=True), scales=st.tuples(st.floats(0.5, 50), st.floats(0.5, 50)))
def test_gdpo_does_not_depend_on_the_scale_of_a_reward(step, scales):
    """Up to the 1e-4 beside the standard deviation, here of rewards that are alike or 10 apart at least."""
    by_function = 1e4 * torch.stack([step["rewards"], step["rewards"].flip(1)], -1)
    weights = torch.tensor([1.0, 0.25], dtype=torch.float64)
    plain, scaled = (normalize_then_sum(x, weights) for x in (by_function, by_function * torch.tensor(scales).double()))
    close(scaled.nan_to_num(), plain.nan_to_num(), 1e-3, 1e-3)


@settings(max_examples=20, deadline=None)
@given(step=steps(missing=True))
def test_gdpo_with_one_reward_is_group_over_its_standard_deviation(step):
    rewards = step["rewards"]
    gdpo = advantages_of(normalize_then_sum(rewards[..., None], torch.ones(1)), "reinforce_pp")
    group = advantages_of(rewards)
    known = group[~rewards.isnan()]
    std = known.std() if len(known) > 1 else 0.0
    close(gdpo, group / (std + 1e-4), 1e-6, 1e-6)
