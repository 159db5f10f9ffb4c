"""Advantages: numbers by hand, the oracle, TRL's own code, and the laws of a comparison."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from logratio.benchmarks.peers.truths import random_model
from logratio.losses import KL_ESTIMATORS
from logratio.losses.advantages import (
    ADVANTAGES,
    AGGREGATIONS,
    SCALES,
    Advantage,
    Context,
    advantages_of,
    normalize,
    normalize_then_sum,
    sum_then_normalize,
)
from logratio.reference import oracle, trl
from logratio.trainers.policy.tiny import tiny_tokenizer

NAN = math.nan
KINDS = [*((name, {}) for name in ADVANTAGES), ("group", {"scale": "batch"}), ("group", {"scale": "none"})]
every_kind = pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda x: str(x))
OF_THE_STEP = ("reinforce_pp", "reinforce_pp_tokens")
zero_sum = [(kind, options) for kind, options in KINDS if kind not in (*OF_THE_STEP, "remax", "opo", "passk")]
RATIOS = ("maxrl",)
"""Whose unit is not that of rewards: these must not be negative, and a shift of all of them matters."""

numbers = st.floats(-100, 100).map(lambda x: round(x, 3))


@st.composite
def steps(draw: Any, missing: bool = False) -> dict[str, Tensor]:
    """Rewards of one to four groups, with lengths and baselines; two completions of a group or none are known."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(2, 5)))
    values = [[draw(st.sampled_from([0.0, 1.0]) | numbers) for _ in range(shape[1])] for _ in range(shape[0])]
    lengths = [[draw(st.integers(1, 50)) for _ in range(shape[1])] for _ in range(shape[0])]
    rewards = torch.tensor(values, dtype=torch.float64)
    if missing:
        for row in rewards:
            unknown = draw(st.sets(st.integers(0, shape[1] - 1)))
            keep = len(row) - len(unknown) >= 2 or len(row) == len(unknown)
            row[list(unknown) if keep else []] = NAN
    baseline = torch.tensor([[draw(numbers)] for _ in range(shape[0])], dtype=torch.float64)
    return {"rewards": rewards, "lengths": torch.tensor(lengths), "baseline": baseline}


def of(kind: str, step: dict[str, Tensor]) -> dict[str, Tensor]:
    """The step, with rewards that the advantage takes."""
    return step | {"rewards": step["rewards"].abs()} if kind in RATIOS else step


def close(a: Tensor, b: Tensor, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# By hand --------------------------------------------------------------------------------------------------------------

REWARDS = [[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 2.0]]
ONE = tensor([1.0, 3.0], [0.0, 0.0])  # mean 1, deviations 0, 2, -1, -1: variance 2


def test_group_by_hand():
    """Rewards 1, 0, 0, 1 have the mean 1/2 and, with Bessel's correction, the variance 1/3."""
    first, second = 0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (math.sqrt(2 / 3) + 1e-4)
    wanted = tensor([first, -first, -first, first], [second, -second, 0.0, 0.0])
    close(advantages_of(tensor(*REWARDS)), wanted, 1e-12, 0)
    close(advantages_of(tensor(*REWARDS), scale="none"), tensor([0.5, -0.5, -0.5, 0.5], [1.0, -1.0, 0.0, 0.0]), 0, 0)
    all_of_them = math.sqrt((3 * 0.25**2 + 2 * 1.25**2 + 1.75**2 + 2 * 0.75**2) / 7)  # mean 5/4
    close(advantages_of(tensor(*REWARDS), scale="batch")[1], tensor([1.0, -1.0, 0.0, 0.0])[0] / (all_of_them + 1e-4))


def test_the_others_by_hand():
    root = math.sqrt(2) + 1e-4
    close(advantages_of(ONE, "rloo"), tensor([-2.0, 2.0], [0.0, 0.0]), 0, 0)
    close(advantages_of(ONE, "reinforce_pp"), tensor([0.0, 2 / root], [-1 / root, -1 / root]))
    centred = math.sqrt(2 / 3) + 1e-4  # of -1, 1, 0, 0
    close(advantages_of(ONE, "reinforce_pp_baseline"), tensor([-1 / centred, 1 / centred], [0.0, 0.0]))
    close(advantages_of(ONE, "remax", baseline=tensor([0.5], [-2.0])), tensor([0.5, 2.5], [2.0, 2.0]), 0, 0)
    # baseline (3 * 1 + 1 * 3) / 4
    close(advantages_of(ONE, "opo", lengths=torch.tensor([[3, 1], [5, 7]])), tensor([-0.5, 1.5], [0.0, 0.0]), 0, 0)


def test_relatives_by_hand():
    rewards = tensor([1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4)
    half, quarter = math.sqrt(1 / 3) + 1e-4, 0.5 + 1e-4  # standard deviations
    third = 1 / 3
    loo = tensor([2 * third, -2 * third, -2 * third, 2 * third], [1.0, -third, -third, -third], [0.0] * 4)
    close(advantages_of(rewards, "rloo_std"), loo / tensor([half], [quarter], [1.0]), 1e-12)
    close(advantages_of(rewards, "maxrl"), tensor([1.0, -1.0, -1.0, 1.0], [3.0, -1.0, -1.0, -1.0], [0.0] * 4), 0, 0)
    close(advantages_of(rewards, "passk"), tensor([0.0] * 4, [1.0, 0.0, 0.0, 0.0], [0.0] * 4), 0, 0)
    close(advantages_of(tensor([3.0, 1.0, 2.0]), "passk"), tensor([1.0, 0.0, 0.0]), 0, 0)
    close(advantages_of(rewards, "gpg"), 1.5 * advantages_of(rewards, scale="none"), 1e-14)
    # 1, 0 of 3 and 1 tokens: mean 3/4, variance (3/16 + 9/16) / 3 = 1/4
    got = advantages_of(tensor([1.0, 0.0]), "reinforce_pp_tokens", lengths=torch.tensor([[3, 1]]))
    close(got, tensor([0.25, -0.75]) / (0.5 + 1e-4), 1e-12)


def test_maxrl_wants_rewards_that_are_not_negative():
    with pytest.raises(ValueError, match="^maxrl divides by the mean reward: none may be negative, got -1$"):
        advantages_of(tensor([1.0, -1.0, NAN]), "maxrl")
    with pytest.raises(ValueError, match="^reinforce_pp_tokens counts tokens: give `lengths`"):
        advantages_of(ONE, "reinforce_pp_tokens")


def test_maxrl_is_an_unbiased_gradient_of_log_p_up_to_the_order_of_the_group():
    """Of binary rewards E[sum A score / G] = sum over k < G - 1 of (1 - p)^k grad p (its Theorem 5), p = 0.3, G = 3."""
    p, group = 0.3, 3
    total = 0.0
    for outcome in range(2**group):
        rewards = tensor([float(outcome >> i & 1) for i in range(group)])
        chance = math.prod(p if r else 1 - p for r in rewards[0].tolist())
        scores = rewards / p - (1 - rewards) / (1 - p)  # d log(chance) / dp
        total += chance * (advantages_of(rewards, "maxrl") * scores).mean().item()
    assert total == pytest.approx(sum((1 - p) ** k for k in range(group - 1)), rel=1e-12)


# A sum of several, and one's own --------------------------------------------------------------------------------------


def test_a_sum_of_several():
    got = advantages_of(ONE, ["rloo", "group"], weights=[0.7, 0.3], scale="none")
    close(got, 0.7 * tensor([-2.0, 2.0], [0.0, 0.0]) + 0.3 * tensor([-1.0, 1.0], [0.0, 0.0]), 1e-14, 0)
    close(advantages_of(ONE, ["rloo", "rloo"]), 2 * advantages_of(ONE, "rloo"), 0, 0)
    close(advantages_of(ONE, ["rloo"], weights=[0.5]), advantages_of(ONE, "rloo") / 2, 0, 0)
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


def own(formula: Any) -> Advantage:
    return Advantage(formula, 2, False, False)


def test_an_own_formula():
    def squared(rewards: Tensor, context: Context) -> Tensor:
        return rewards.square()

    close(advantages_of(ONE, own(squared)), ONE.square(), 0, 0)
    close(advantages_of(ONE, [own(squared), "rloo"], weights=[2, 1]), 2 * ONE.square() + advantages_of(ONE, "rloo"))


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


def test_whitened_over_the_step_by_hand():
    """Leave-one-out -2, 2, 0, 0: mean 0, variance 8/3."""
    got = advantages_of(ONE, "rloo", normalize_advantages=True)
    close(got, tensor([-2.0, 2.0], [0.0, 0.0]) / (math.sqrt(8 / 3) + 1e-4))


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


def test_rewards_without_an_opinion_do_not_count():
    got = advantages_of(tensor([1.0, NAN, 0.0], [NAN, NAN, NAN], [2.0, NAN, NAN]))
    known = 0.5 / (math.sqrt(0.5) + 1e-4)
    close(got, tensor([known, 0.0, -known], [0.0] * 3, [0.0] * 3))


@every_kind
@pytest.mark.parametrize("normalized", [False, True])
def test_with_next_to_nothing_known_all_is_zero(kind, options, normalized):
    """No reward at all, or one alone that nothing can be compared with (ReMax has the greedy answer for that)."""
    others = {"lengths": torch.ones(2, 3), "baseline": tensor([7.0], [NAN]), "normalize_advantages": normalized}
    for rewards in (tensor([NAN] * 3, [NAN] * 3), tensor([NAN, NAN, 7.0], [NAN] * 3)):
        assert (advantages_of(rewards, kind, **options, **others) == 0).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="^rewards must be \\[groups, G\\], got \\[2\\]$"):
        advantages_of(torch.zeros(2))
    with pytest.raises(ValueError, match="advantage_type='best' is unknown, expected one of: group, rloo"):
        advantages_of(ONE, "best")
    with pytest.raises(ValueError, match="scale='all' is unknown, expected one of: group, batch, none"):
        advantages_of(ONE, scale="all")
    with pytest.raises(ValueError, match="remax compares with the reward of a greedy completion"):
        advantages_of(ONE, "remax")
    with pytest.raises(ValueError, match="opo weighs rewards by the completions' lengths"):
        advantages_of(ONE, "opo")
    with pytest.raises(ValueError, match=r"lengths must be \[2, 2\] for rewards \[2, 2\], got \[4\]"):
        advantages_of(ONE, "opo", lengths=torch.ones(4))
    with pytest.raises(ValueError, match=r"baseline must be \[2, 1\] for rewards \[2, 2\], got \[2\]"):
        advantages_of(ONE, "remax", baseline=torch.ones(2))


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimators_are_the_oracles(estimator):
    d = torch.tensor([-1.5, -1e-6, 0.0, 1e-6, 0.7, 9.0], dtype=torch.float64)
    wanted = torch.stack([oracle.kl_estimate(x, torch.zeros(()), estimator) for x in d])
    close(KL_ESTIMATORS[estimator](d), wanted, rtol=1e-6, atol=1e-15)


def test_what_each_type_asks_of_the_rollouts():
    """(smallest group, whitened over the step already, a greedy answer to compare with)"""
    asked = {name: (a.smallest_group, a.whitened, a.wants_greedy) for name, a in ADVANTAGES.items()}
    assert asked == {
        "group": (2, False, False),
        "rloo": (2, False, False),
        "reinforce_pp": (1, True, False),
        "reinforce_pp_baseline": (2, True, False),
        "remax": (1, False, True),
        "opo": (2, False, False),
        "rloo_std": (2, False, False),
        "maxrl": (2, False, False),
        "passk": (2, False, False),
        "gpg": (2, False, False),
        "reinforce_pp_tokens": (1, True, False),
    }
    with pytest.raises(AttributeError):
        ADVANTAGES["group"].whitened = True


# The oracle -----------------------------------------------------------------------------------------------------------


def lists(rewards: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(x) else x for x in row] for row in rewards.tolist()]


@every_kind
@settings(max_examples=20, deadline=None)
@given(step=steps(missing=True))
def test_it_is_the_oracle(kind, options, step):
    step = of(kind, step)
    rewards = lists(step["rewards"])
    wanted = {
        "group": lambda: oracle.advantages(rewards, options.get("scale", "group")),
        "rloo": lambda: oracle.rloo(rewards),
        "reinforce_pp": lambda: oracle.reinforce_pp(rewards),
        "reinforce_pp_baseline": lambda: oracle.reinforce_pp_baseline(rewards),
        "remax": lambda: oracle.remax(rewards, step["baseline"].flatten().tolist()),
        "opo": lambda: oracle.opo(rewards, step["lengths"].tolist()),
        "rloo_std": lambda: oracle.rloo_std(rewards),
        "maxrl": lambda: oracle.maxrl(rewards),
        "passk": lambda: oracle.passk(rewards),
        "gpg": lambda: oracle.gpg(rewards),
        "reinforce_pp_tokens": lambda: oracle.reinforce_pp_tokens(rewards, step["lengths"].tolist()),
    }[kind]()
    close(advantages_of(**step, advantage_type=kind, **options), tensor(*wanted), 1e-7, 1e-7)


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


# TRL ------------------------------------------------------------------------------------------------------------------

BY_FUNCTION = [
    [[1.0, 2.0], [0.5, None], [2.5, -1.0]],
    [[None, None], [3.0, 1.0], [0.25, 7.0]],
    [[0.5, 0.5], [None, None], [None, None]],
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]],
]
WEIGHTS = (1.0, 0.5)


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        *(("grpo", "group", {"scale_rewards": scale}) for scale in SCALES),
        ("grpo", "reinforce_pp", {"multi_objective_aggregation": "normalize_then_sum"}),
        ("rloo", "rloo", {}),
        ("rloo", "rloo", {"normalize_advantages": True}),
        ("rloo", "rloo", {"beta": 0.1}),
    ],
    ids=str,
)
def test_trl_gives_the_same(method, kind, options):
    """Groups of which all, some, one and none of the completions are known, and one of equal rewards."""
    flat = [row for group in BY_FUNCTION for row in group]
    kl = [0.3 * i - 1 for i in range(len(flat))] if "beta" in options else None
    theirs = trl.advantages(
        method, random_model(LlamaConfig, 3), tiny_tokenizer(), flat, num_generations=3, kl=kl,
        reward_weights=list(WEIGHTS), **options,
    )  # fmt: skip
    options = dict(options)
    aggregation = AGGREGATIONS[options.pop("multi_objective_aggregation", "sum_then_normalize")]
    by_function = torch.tensor([[[NAN if x is None else x for x in r] for r in g] for g in BY_FUNCTION]).double()
    rewards = aggregation(by_function, torch.tensor(WEIGHTS))
    if "beta" in options:
        rewards = rewards - options.pop("beta") * torch.tensor(kl, dtype=torch.float64).view(4, 3)
    scale = options.pop("scale_rewards", "group")
    ours = advantages_of(rewards, kind, scale=scale, **options)
    close(ours.flatten(), torch.tensor(theirs).double(), 2e-5, 2e-6)
    assert ours.abs().max() > 0.5


# Laws -----------------------------------------------------------------------------------------------------------------


@every_kind
@settings(max_examples=20, deadline=None)
@given(step=steps(missing=True), shift=numbers)
def test_only_differences_of_rewards_matter(kind, options, step, shift):
    if kind in RATIOS:
        return
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
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -2.7])
def test_equal_rewards_are_exactly_zero_though_their_mean_is_rounded(kind, options, reward, size):
    reward = abs(reward) if kind in RATIOS else reward
    rewards = torch.full((3, size), reward, dtype=torch.float64)
    rewards[1, 0] = NAN
    lengths = torch.arange(1, 3 * size + 1).view(3, size)
    for normalized in (False, True):
        others = {"lengths": lengths, "baseline": rewards[:, 1:2], "normalize_advantages": normalized}
        assert (advantages_of(rewards, kind, **options, **others) == 0).all()
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
@given(step=steps(missing=True), scales=st.tuples(st.floats(0.5, 50), st.floats(0.5, 50)))
def test_gdpo_does_not_depend_on_the_scale_of_a_reward(step, scales):
    """Up to the 1e-4 beside the standard deviation, here of rewards that are 100 times larger."""
    by_function = 100 * torch.stack([step["rewards"], step["rewards"].flip(1)], -1)
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
