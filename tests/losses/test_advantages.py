"""Advantages of one kind: numbers by hand, the oracle, TRL's own code."""

import math

import pytest
import torch
from hypothesis import given, settings
from transformers import LlamaConfig

from logratio.benchmarks.peers.randoms import random_model
from logratio.losses.advantages import ADVANTAGES, AGGREGATIONS, SCALES, Context, advantages_of
from logratio.reference import oracle, trl
from logratio.trainers.policy.tiny import tiny_tokenizer

from ._advantages import NAN, ONE, close, every_kind, lists, of, steps, tensor

REWARDS = [[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 2.0]]


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
    # without the empty one the tokens' rewards are 1, 1, 0: mean 2/3, variance 1/3
    got = advantages_of(tensor([1.0, 0.0, 5.0]), "reinforce_pp_tokens", lengths=torch.tensor([[2, 1, 0]]))
    close(got, tensor([third, -2 * third, 0.0]) / (math.sqrt(third) + 1e-4), 1e-12)
    # a token each: mean 1/2, variance 1/2
    got = advantages_of(tensor([1.0, 0.0]), "reinforce_pp_tokens", lengths=torch.ones(1, 2))
    close(got, tensor([0.5, -0.5]) / (math.sqrt(0.5) + 1e-4), 1e-12)
    alone = ADVANTAGES["reinforce_pp_tokens"](tensor([1.0, 0.0]), Context(lengths=torch.tensor([[1, 0]])))
    assert alone.tolist() == [[0, 0]]


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


def test_whitened_over_the_step_by_hand():
    """Leave-one-out -2, 2, 0, 0: mean 0, variance 8/3."""
    got = advantages_of(ONE, "rloo", normalize_advantages=True)
    close(got, tensor([-2.0, 2.0], [0.0, 0.0]) / (math.sqrt(8 / 3) + 1e-4))


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
