"""How rewards are found by name, and those that have one of their own."""

import functools
import sys

import pytest

from logratio.trainers.errors import UserError
from logratio.trainers.rollout.calling.asked import names_of
from logratio.trainers.rollout.rewards import REWARDS, answer_format, load_reward, load_rewards, overlong


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


@pytest.mark.parametrize("limit", [5, 100, 1280, 20480])
def test_overlong_is_trls_with_a_fifth_as_its_cache(limit):
    """DAPO trains with 16,384 tokens and a cache of 4,096 behind them: a fifth of all."""
    rewards = pytest.importorskip("trl.rewards")
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=limit, soft_punish_cache=limit // 5)
    ids = [
        [1] * n for n in {*range(0, limit, max(1, limit // 40)), limit * 4 // 5, limit * 4 // 5 + 1, limit - 1, limit}
    ]
    assert overlong(completion_ids=ids, max_completion_length=limit) == pytest.approx(theirs(completion_ids=ids))


MODULE = """
import torch

def flat(completions, **_):
    return [0.5 for _ in completions]

class Judge:
    def __init__(self, base=1.0):
        self.base = base
    def __call__(self, completions, **_):
        return [self.base for _ in completions]

class Picky(Judge):
    def __init__(self, base):
        super().__init__(base)

class Silent:
    pass

judge = Picky(2.0)
model = torch.nn.Linear(2, 2)
number = 3
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "leaving_rewards.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("my_rewards", "broken_rewards", "leaving_rewards"):
        sys.modules.pop(name, None)


def test_rewards_are_found_by_name_and_by_module(modules):
    assert all(load_reward(name) is reward for name, reward in REWARDS.items())
    for name, value in [("flat", 0.5), ("judge", 2.0), ("Judge", 1.0)]:
        assert load_reward(f"my_rewards:{name}")(completions=["a", "b"]) == [value, value]


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "exact",
            "the reward 'exact' is unknown, expected one of exact_answer, accuracy_reward, answer_format, overlong,",
        ),
        ("my_rewards:", "must be written as module:name"),
        ("nowhere:flat", "there is no module 'nowhere'"),
        (
            "../my/mine.py:flat",
            "must name a module, not its file: mine:flat, with PYTHONPATH=../my where",
        ),
        ("nowhere.deep:flat", "there is no module 'nowhere'"),
        ("my_rewards:sharp", "the module 'my_rewards' .*my_rewards.py. has no 'sharp'"),
        ("my_rewards:number", "must be a function, but is int"),
        ("my_rewards:Silent", "must be a function, but is Silent"),
        (
            "my_rewards:model",
            "the reward Linear is no classifier of transformers: write a function of completions that calls",
        ),
        ("my_rewards:Picky", "is a class of which no object could be made without arguments .TypeError: .*'base'"),
        ("leaving_rewards:flat", "its module wanted to end the program .SystemExit: 0."),
    ],
)
def test_a_reward_that_cannot_be_had_is_one_sentence(modules, name, message):
    with pytest.raises(UserError, match=message):
        load_reward(name)


def test_what_is_wrong_inside_the_users_module_keeps_its_traceback(modules):
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        load_reward("broken_rewards:flat")


def test_metrics_are_named_as_trl_names_them(modules):
    trl = pytest.importorskip("trl.trainer.utils")
    specs = ["my_rewards:flat", "my_rewards:judge", "exact_answer"]
    loaded = load_rewards(specs, ["answer"])
    assert list(loaded) == ["flat", "Picky", "exact_answer"]
    assert list(loaded) == [trl.get_callable_name(reward) for reward in loaded.values()]
    partial = functools.partial(load_reward("my_rewards:flat"), extra=1)
    assert names_of([("m:p", partial)]) == ["flat"] == [trl.get_callable_name(partial)]


def test_rewards_of_one_name_count_separately(modules):
    loaded = load_rewards(["my_rewards:flat", "exact_answer", "my_rewards:flat", "my_rewards:flat"], ["answer"])
    assert list(loaded) == ["flat", "exact_answer", "flat_2", "flat_3"]
    assert names_of([("m:short", lambda **_: [])]) == ["short"]


@pytest.mark.parametrize(
    "specs, columns, message",
    [
        ([], ["answer"], "--reward_funcs names no reward function"),
        (
            ["exact_answer"],
            ["level"],
            "the reward 'exact_answer' needs 'answer', which is neither a column .*.level. nor",
        ),
        (["exact_answer"], [], "neither a column of the data set .which has only the prompt. nor one of prompts, comp"),
    ],
)
def test_rewards_and_columns_are_held_together_before_anything_runs(specs, columns, message):
    with pytest.raises(UserError, match=message):
        load_rewards(specs, columns)
