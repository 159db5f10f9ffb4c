"""What counts as an answer, how rewards are found by name, and what they are held to."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logratio.trainers.errors import UserError
from logratio.trainers.rollout.rewards import REWARDS, answer_format, call_reward, exact_answer, load_reward, overlong


@pytest.mark.parametrize(
    "completion, answer, right",
    [
        ("46", "46", True),
        ("47", "46", False),
        ("046", 46, True),
        ("46.0", "46", True),
        ("first 3, then 46.", "46", True),
        ("46, that is 40 and 6", "46", False),
        ("12+34=46\nA: 46 apples for 2 days", "46", True),
        ("A: 3\nno, A: 4\nA: 46", "46", True),
        ("#### 36,000", "36000", True),
        ("The answer is $1,000.50.", "1000.5", True),
        ("To answer this: 40+6=46", "46", True),
        (r"so \boxed{46}, not 47", "46", True),
        ("x = -46", "46", False),
        ("x = -46", "-46", True),
        ("92-46", "46", True),
        ("(92)-46", "46", True),
        ("Answer: Paris.", "paris", True),
        ("It was\nParis", "paris", True),
        ("", "46", False),
        ("no idea", "46", False),
        ([{"role": "user", "content": "46"}, {"role": "assistant", "content": "A: 45"}], "46", False),
        ([{"role": "assistant", "content": "A: 46"}], "long story\n#### 46", True),
    ],
)
def test_exact_answer(completion, answer, right):
    assert exact_answer(completions=[completion], answer=[answer], prompts=[""]) == [float(right)]


@settings(max_examples=50, deadline=None)
@given(st.integers(-(10**9), 10**9))
def test_a_number_is_its_own_answer_however_it_is_written(number):
    completions = [f"{number}", f"{number:,}", f"A: {number}", f"so it is {number:,}.00 in all", f"#### {number} of 7"]
    assert exact_answer(completions=completions, answer=[number] * 5) == [1.0] * 5
    assert exact_answer(completions=completions, answer=[number + 1] * 5) == [0.0] * 5


@pytest.mark.parametrize(
    "completion, fits",
    [("A: 20", 1), ("so\n#### -1,000.5\n", 1), ("A: 20 days", 0), ("20", 0), ("A: 20\nmore", 0), ("BA: 2", 0), ("", 0)],
)
def test_answer_format(completion, fits):
    assert answer_format(completions=[completion]) == [fits]


def test_overlong_falls_from_four_fifths_to_the_full_length():
    lengths = [0, 80, 85, 90, 100]
    values = overlong(completion_ids=[[1] * n for n in lengths], max_completion_length=100)
    assert values == [0, 0, -0.25, -0.5, -1]


def test_rewards_are_found_by_name_and_by_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def flat(completions, **_):\n    return [0.5 for _ in completions]\n\nnumber = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert all(load_reward(name) is reward for name, reward in REWARDS.items())
    assert load_reward("my_rewards:flat")(completions=["a", "b"]) == [0.5, 0.5]
    for name, message in [
        ("exact", "the reward 'exact' is unknown, expected one of exact_answer, answer_format, overlong, or module:f"),
        ("my_rewards:", "must be written as module:name"),
        ("nowhere:flat", "there is no module 'nowhere'"),
        ("nowhere.deep:flat", "there is no module 'nowhere'"),
        ("my_rewards:sharp", "the module 'my_rewards' .*my_rewards.py. has no 'sharp'"),
        ("my_rewards:number", "must be a function, but is int"),
    ]:
        with pytest.raises(UserError, match=message):
            load_reward(name)
    # What is wrong inside the user's module is not the option's fault, and keeps its traceback.
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        load_reward("broken_rewards:flat")


def called(reward, **columns):
    return call_reward(
        "mine",
        reward,
        prompts=["p", "p"],
        completions=["1", "22"],
        completion_ids=[[1], [2, 2]],
        max_completion_length=10,
        columns=columns,
    )


def test_a_reward_gets_columns_by_name_and_may_abstain():
    def reward(prompts, completions, completion_ids, level, weight=2, **_):
        return [None, len(completion_ids[1]) * level[1] * weight]

    assert called(reward, level=[3, 4]) == [None, 16.0]


@pytest.mark.parametrize(
    "reward, message",
    [
        (exact_answer, "the reward 'mine' needs the column 'answer', but the data set has only level"),
        (lambda completions, **_: [1.0], "returned 1 numbers for 2 completions"),
        (lambda completions, **_: [1.0, "good"], "must return numbers or None, got 'good'"),
        (lambda completions, **_: [1.0, float("nan")], "must return finite numbers or None, got nan"),
    ],
)
def test_a_reward_is_held_to_its_signature(reward, message):
    with pytest.raises(UserError, match=message):
        called(reward, level=[1, 2])
