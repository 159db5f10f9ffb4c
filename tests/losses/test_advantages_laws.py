"""Laws of advantages: what a comparison of rewards keeps, whichever formula it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logratio.losses.advantages import ADVANTAGES, Context, advantages_of, normalize, normalize_then_sum

from ._advantages import KINDS, NAN, RATIOS, close, every_kind, numbers, of, steps

OF_THE_STEP = ("reinforce_pp", "reinforce_pp_tokens")
zero_sum = [(kind, options) for kind, options in KINDS if kind not in (*OF_THE_STEP, "remax", "opo", "passk")]


@pytest.mark.parametrize(("kind", "options"), [one for one in KINDS if one[0] not in RATIOS], ids=str)
@settings(max_examples=20, deadline=None)
@given(step=steps(missing=True), shift=numbers)
def test_only_differences_of_rewards_matter(kind, options, step, shift):
    shifted = {name: step[name] + shift for name in ("rewards", "baseline")} | {"lengths": step["lengths"]}
    moved, plain = (advantages_of(**s, advantage_type=kind, **options) for s in (shifted, step))
    close(moved, plain, 1e-5, 1e-6)


@pytest.mark.parametrize(("kind", "options"), zero_sum, ids=str)
@settings(max_examples=20, deadline=None)
@given(step=steps(missing=True))
def test_the_advantages_of_a_group_sum_to_zero(kind, options, step):
    step = of(kind, step)
    assert (advantages_of(**step, advantage_type=kind, **options).sum(1).abs() <= 1e-8).all()


@settings(max_examples=20, deadline=None)
@given(step=steps(missing=True))
def test_opo_sums_to_zero_by_tokens_and_is_dr_grpo_at_equal_lengths(step):
    assert ((advantages_of(**step, advantage_type="opo") * step["lengths"]).sum(1).abs() <= 1e-8).all()
    rewards = step["rewards"]
    equal = advantages_of(rewards, "opo", lengths=torch.full(rewards.shape, 3))
    close(equal, advantages_of(rewards, scale="none"))


@settings(max_examples=20, deadline=None)
@given(step=steps())
def test_leave_one_out_is_dr_grpo_times_g_over_g_minus_1(step):
    rewards = step["rewards"]
    group = rewards.shape[1]
    close(advantages_of(rewards, "rloo"), group / (group - 1) * advantages_of(rewards, scale="none"))


@every_kind
@pytest.mark.parametrize("size", [3, 6, 7, 10])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, -2.7])
def test_equal_rewards_are_exactly_zero_though_their_mean_is_rounded(kind, options, reward, size):
    reward = abs(reward) if kind in RATIOS else reward
    rewards = torch.full((3, size), reward, dtype=torch.float64)
    rewards[1, 0] = NAN
    lengths = torch.arange(1, 3 * size + 1).view(3, size)
    others = {"lengths": lengths, "baseline": rewards[:, 1:2]}
    for normalized in (False, True):
        assert (advantages_of(rewards, kind, **options, **others, normalize_advantages=normalized) == 0).all()
    formed = ADVANTAGES[kind](rewards, Context(**options, **others))
    assert formed[~rewards.isnan()].tolist() == [0] * (3 * size - 1)  # not NaN, which no statistic would count
    by_function = rewards[..., None].expand(-1, -1, 2)
    assert (normalize_then_sum(by_function, torch.tensor([0.3, 0.7])).nan_to_num() == 0).all()


@every_kind
@settings(max_examples=20, deadline=None)
@given(step=steps(), seed=st.integers(0, 9))
def test_order_does_not_matter_and_a_better_reward_has_the_larger_advantage(kind, options, step, seed):
    step = of(kind, step)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(n, generator=generator) for n in step["rewards"].shape)
    moved = {name: value[rows] for name, value in step.items()}
    moved |= {name: moved[name][:, columns] for name in ("rewards", "lengths")}
    plain = advantages_of(**step, advantage_type=kind, **options)
    close(advantages_of(**moved, advantage_type=kind, **options), plain[rows][:, columns], 1e-9, 1e-7)
    order = step["rewards"].argsort(1)
    assert (plain.gather(1, order).diff() >= -1e-9).all()


@settings(max_examples=20, deadline=None)
@given(step=steps(missing=True))
def test_whitened_advantages_have_mean_0_and_variance_1(step):
    known = step["rewards"][~step["rewards"].isnan()]
    values = normalize(step["rewards"])
    assert (values.isnan() == step["rewards"].isnan()).all()
    values = values[~values.isnan()]
    if len(values):
        assert abs(values.mean()) < 1e-8
        close(values.std(), known.std() / (known.std() + 1e-4), 1e-6, 1e-8)
