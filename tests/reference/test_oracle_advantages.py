"""The oracle's advantages against numbers worked out by hand."""

from math import log, sqrt

import pytest
import torch
from torch import tensor

from logratio.reference import oracle

REWARDS = [[0.0, 1.0, 5.0], [2.0, 2.0, 8.0]]  # means 2 and 4
EPS = 1e-4


def flat(groups: list[list[float]]) -> list[float]:
    return [value for group in groups for value in group]


def test_advantages() -> None:
    rewards = [[0.0, 1.0], [3.0, 3.0]]
    root = sqrt(1 / 2)  # the unbiased deviation of 0 and 1
    assert oracle.advantages(rewards)[0] == pytest.approx([-0.5 / (root + EPS), 0.5 / (root + EPS)])
    assert oracle.advantages(rewards)[1] == [0.0, 0.0]
    assert oracle.advantages(rewards, "none") == [[-0.5, 0.5], [0.0, 0.0]]
    # all four: mean 7/4, squares 49/16 + 9/16 + 25/16 + 25/16 = 108/16, over 3: 9/4, root 3/2
    assert oracle.advantages(rewards, "batch")[0] == pytest.approx([-0.5 / 1.5001, 0.5 / 1.5001])
    assert oracle.advantages([[4.0]]) == [[0.0]]
    with pytest.raises(ValueError, match="no formula"):
        oracle.advantages(rewards, "std")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_what_nothing_could_score_takes_no_part(scale: str) -> None:
    with_none = oracle.advantages([[0.0, None, 1.0], [3.0, 3.0, None], [None, None]], scale)
    without = oracle.advantages([[0.0, 1.0], [3.0, 3.0]], scale)
    assert with_none == [[without[0][0], 0.0, without[0][1]], [0.0, 0.0, 0.0], [0.0, 0.0]]


def test_sums_of_rewards() -> None:
    by_function = [[[1.0, None, 2.0]], [[10.0, 20.0, None]]]
    assert oracle.total_rewards(by_function) == [[11.0, 20.0, 2.0]]
    assert oracle.total_rewards(by_function, [2.0, 0.5]) == [[7.0, 10.0, 4.0]]
    assert oracle.total_rewards([[[None, 1.0]], [[None, 1.0]]]) == [[None, 2.0]]


def test_normalize_then_sum() -> None:
    # one group of two: both functions give -+1/sqrt 2 or so, one of them the other way round
    by_function = [[[0.0, 4.0], [1.0, 1.0]], [[3.0, 1.0], [0.0, 2.0]]]
    a, b, c = 2 / (sqrt(8) + EPS), 1 / (sqrt(2) + EPS), 1 / (sqrt(2) + EPS)
    sums = [-a + 2 * b, a - 2 * b, -2 * c, 2 * c]
    spread = sqrt(sum(x * x for x in sums) / 3)
    expected = [x / (spread + EPS) for x in sums]
    assert flat(oracle.normalize_then_sum(by_function, [1.0, 2.0])) == pytest.approx(expected)
    scaled = [by_function[0], [[100 * x for x in group] for group in by_function[1]]]
    assert flat(oracle.normalize_then_sum(scaled, [1.0, 2.0])) == pytest.approx(expected, abs=1e-3)
    # of one function it is the group advantage over its own deviation: groups of 4 lose 1 of 4, the step 1 of 12
    single = oracle.normalize_then_sum([[[0.0, 1.0, 2.0, 5.0]] * 3])
    assert single[0][3] / oracle.advantages([[0.0, 1.0, 2.0, 5.0]])[0][3] == pytest.approx(1.1055, abs=2e-4)
    assert oracle.normalize_then_sum([[[0.0, None, 1.0]]])[0][1] == 0


def test_rloo() -> None:
    assert oracle.rloo(REWARDS) == [[-3.0, -1.5, 4.5], [-3.0, -3.0, 6.0]]
    centred = flat(oracle.advantages(REWARDS, "none"))
    assert flat(oracle.rloo(REWARDS)) == pytest.approx([3 / 2 * x for x in centred])
    assert oracle.rloo([[4.0], [None, 5.0], [None, 5.0, 6.0]]) == [[0.0], [0.0, 0.0], [0.0, -1.0, 1.0]]


def test_reinforce_plus_plus() -> None:
    # mean 3; squares 9 + 4 + 4 + 1 + 1 + 25 = 44 over 5
    expected = [(x - 3) / (sqrt(44 / 5) + EPS) for x in flat(REWARDS)]
    assert flat(oracle.reinforce_pp(REWARDS)) == pytest.approx(expected)
    # centred by groups -2 -1 3 -2 -2 4: squares 38 over 5
    expected = [x / (sqrt(38 / 5) + EPS) for x in (-2, -1, 3, -2, -2, 4)]
    assert flat(oracle.reinforce_pp_baseline(REWARDS)) == pytest.approx(expected)
    assert oracle.reinforce_pp([[1.0, None], [3.0]])[0][1] == 0 == oracle.reinforce_pp_baseline([[None], [3.0]])[0][0]
    assert oracle.whiten([[None, None]]) == [[0.0, 0.0]]


def test_remax() -> None:
    assert oracle.remax(REWARDS, [1.0, 8.0]) == [[-1.0, 0.0, 4.0], [-6.0, -6.0, 0.0]]
    assert oracle.remax([[None, 1.0]], [0.5]) == [[0.0, 0.5]]


def test_opo() -> None:
    # (0 * 4 + 1 * 1 + 5 * 3) / 8 = 2; equal lengths: the mean
    assert oracle.opo(REWARDS, [[4, 1, 3], [5, 5, 5]]) == [[-2.0, -1.0, 3.0], [-2.0, -2.0, 4.0]]
    assert oracle.opo([[1.0, None, 4.0]], [[2, 9, 1]]) == [[-1.0, 0.0, 2.0]]
    assert oracle.opo([[3.0, 3.0], [7.0]], [[0, 0], [5]]) == [[0.0, 0.0], [0.0]]


def test_equal_rewards_have_exactly_no_advantage() -> None:
    for n in range(1, 12):
        group = [[0.1] * n, [0.1] * n]
        for result in (
            *(oracle.advantages(group, scale) for scale in ("group", "batch", "none")),
            oracle.rloo(group),
            oracle.reinforce_pp(group),
            oracle.reinforce_pp_baseline(group),
            oracle.normalize_then_sum([group, group]),
            oracle.opo(group, [[i + 1 for i in range(n)]] * 2),
        ):
            assert result == [[0.0] * n] * 2


def test_kl_in_the_reward() -> None:
    def steps(*sequences: list[float]) -> list[torch.Tensor]:
        return [tensor(sequence, dtype=torch.float64) for sequence in sequences]

    old, ref = steps([-1.0, -2.0], []), steps([-1.5, -2.0 + log(2)], [])
    d = [0.5, -log(2)]
    assert oracle.penalized([1.0, 7.0], old, ref, 0.1) == pytest.approx([1 - 0.1 * sum(d), 7.0])
    squares = oracle.penalized([1.0, 7.0], old, ref, 0.1, "k2")
    assert squares == pytest.approx([1 - 0.05 * sum(x * x for x in d), 7.0])
