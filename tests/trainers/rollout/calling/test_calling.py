"""One call of the rewards: what they are given, what they may answer, and what is said where one fails."""

import asyncio
import functools
import inspect
import os
import sys
import threading
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from logratio.trainers.errors import UserError
from logratio.trainers.rollout.calling.asked import Asked, RewardLog, TrainerState, check_signature
from logratio.trainers.rollout.calling.calls import Calls


def asked(**columns):
    return Asked(["p", "p", "q"], ["one", "two", "three"], [[1], [2, 2], [3]], columns, [7, 7, 9])


def called(*rewards, log=None, state=None, **columns):
    named = {f"r{i}" if i else "mine": reward for i, reward in enumerate(rewards)}
    log, state = log or RewardLog(), state or TrainerState()
    return Calls()(named, asked(**columns), max_completion_length=10, state=state, log=log)


def returning(value):
    return lambda **_: value


# What they are given -------------------------------------------------------------------------------------------------


def test_a_reward_gets_columns_by_name_and_may_abstain():
    def reward(prompts, completions, completion_ids, level, weight=2, **_):
        return [None, len(completion_ids[1]) * level[1] * weight, 0]

    assert called(reward, level=[3, 4, 5]) == [[None, 16.0, 0.0]]


def test_a_reward_gets_only_what_it_takes():
    def reward(completions, *, max_completion_length):
        return [max_completion_length] * len(completions)

    assert called(reward, level=[3, 4, 5]) == [[10.0] * 3]
    assert called(functools.partial(lambda base, completions: [base] * 3, 4)) == [[4.0] * 3]


def test_a_reward_knows_how_far_training_is():
    state = TrainerState(global_step=3, max_steps=8, steps_per_epoch=2)

    def reward(trainer_state, **_):
        return [trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch]

    assert called(reward, state=state) == [[3.0, 8.0, 1.5]]
    with pytest.raises(UserError, match="'mine' raised AttributeError: 'TrainerState' object has no attribute 'log_h"):
        called(lambda trainer_state, **_: trainer_state.log_history)


def test_what_a_reward_does_to_its_lists_changes_nothing():
    def greedy(prompts, completions, completion_ids, level, **_):
        for each in (prompts, completions, level, *completion_ids):
            each.clear()
        return [0.0] * 3

    def counting(prompts, completions, completion_ids, level, **_):
        return [len(prompts), len(completions), sum(map(len, completion_ids)) + len(level)]

    assert called(greedy, counting, level=[1, 2, 3])[1] == [3.0, 3.0, 7.0]


def test_a_reward_logs_metrics():
    log = RewardLog(completions=3)

    def reward(log_metric, log_extra, **_):
        log_metric("judge/tokens", 3)
        log_metric("judge/tokens", torch.tensor(5.0))
        log_extra("verdict", ["a", None, torch.tensor(2.0).item()])
        log_extra("verdict", iter(["a", None, 2.0]))
        return [0.0] * 3

    called(reward, log=log)
    assert log.metrics == {"judge/tokens": [3.0, 5.0]} and log.columns == {"verdict": ["a", None, "2.0"]}


def test_what_is_no_text_is_escaped_in_the_table():
    """Parquet's texts are UTF-8, which has no half of a surrogate pair, as JSON from a judge may."""
    log = RewardLog(completions=3)
    called(lambda log_extra, **_: log_extra("said\ud800", ["a\udfff", "b", None]) or [0.0] * 3, log=log)
    assert log.columns == {"said\\ud800": ["a\\udfff", "b", None]}


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("rewards/x", [1, 2, 3], "log_extra cannot take the name 'rewards/x', a column of the table itself"),
        ("completion", [1, 2, 3], "log_extra cannot take the name 'completion'"),
        (None, [1, 2, 3], "log_extra cannot take the name None"),
        ("verdict", [1, 2], "log_extra('verdict', ...) got 2 values for 3 completions"),
        ("verdict", "yes", "log_extra('verdict', ...) takes a list with a value for each completion"),
        ("taken", [1, 2, 4], "log_extra('taken', ...) was given other values before: choose another name"),
    ],
)
def test_a_column_of_the_table_has_a_name_of_its_own_and_a_value_for_each(column, values, message):
    log = RewardLog(completions=3, columns={"taken": ["1", "2", "3"]})
    with pytest.raises(UserError) as caught:
        called(lambda log_extra, **_: log_extra(column, values), log=log)
    assert str(caught.value).startswith(f"the reward 'mine': {message}")


@pytest.mark.parametrize("name", ["loss", "reward", "kl", "rewards/x/mean", "completions/x", "tokens_per_s", 3])
def test_a_reward_cannot_take_the_logs_own_names(name):
    with pytest.raises(UserError, match=f"the reward 'mine': log_metric cannot take the name {name!r}"):
        called(lambda log_metric, **_: log_metric(name, 1.0))


def test_a_metric_is_a_finite_number():
    with pytest.raises(UserError, match="'mine': log_metric.'a'. takes a finite number, got float nan"):
        called(lambda log_metric, **_: log_metric("a", float("nan")))


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda prompt, **_: [], "needs 'prompt', which is neither .* log_metric: it is given as 'prompts'"),
        (lambda completion, **_: [], "needs 'completion', .*: it is given as 'completions'"),
        (
            lambda environments, **_: [],
            "needs 'environments', which is neither a column of the data set .level. nor one",
        ),
        (lambda completions, /, **_: [], "takes 'completions' by position, but is called by name"),
    ],
)
def test_what_a_reward_asks_for_is_there_or_its_absence_said(reward, message):
    with pytest.raises(UserError, match=message):
        check_signature("mine", reward, ["level"])
    check_signature("mine", lambda level, trainer_state, log_extra, log_metric, own=3, *a, **k: [], ["level"])


# What they may answer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [1, None, 2.5],
        (True, None, Fraction(5, 2)),
        [np.float32(1), None, np.array([2.5])],
        [torch.tensor(1), None, torch.tensor([2.5])],
        [Decimal(1), None, Decimal("2.5")],
        (value for value in (1, None, 2.5)),
    ],
)
def test_numbers_of_many_kinds_are_taken(values):
    assert called(returning(values)) == [[1.0, None, 2.5]]


@pytest.mark.parametrize(
    "values", [np.array([1.0, 2.5, 3.0]), torch.tensor([1, 2.5, 3], dtype=torch.bfloat16, requires_grad=True)]
)
def test_arrays_and_tensors_are_taken_as_lists_are(values):
    assert called(returning(values)) == [[1.0, 2.5, 3.0]]


@pytest.mark.parametrize(
    "result, message",
    [
        ([1.0], "the reward 'mine' returned 1 numbers for 3 completions"),
        ([1.0] * 4, "the reward 'mine' returned 4 numbers for 3 completions"),
        (None, "must return a list with a number or None for each of 3 completions, got NoneType None"),
        (1.0, "must return a list .* got float 1.0"),
        ("123", "must return a list .* got str '123'"),
        ({1: 1, 2: 2, 3: 3}, "must return a list .* got dict"),
        (torch.tensor(1.0), "must return a list .* got float 1.0"),
        ([1, "2", 3], "a finite number .* or None for completion 1 of row 7 of the data set, 'two': got str '2'"),
        (
            [1, 2, "good"],
            "'mine' must return a finite .* for completion 0 of row 9 of the data set, 'three': got str 'good'",
        ),
        ([1, float("nan"), 3], "for completion 1 of row 7 of the data set, 'two': got float nan"),
        ([np.float64("inf"), 1, 3], "for completion 0 of row 7 of the data set, 'one': got float64 .*inf"),
        ([1, 10**400, 3], "in float32, too.* for completion 1 of row 7 .*: got int 1000"),
        ([1, 1e39, 3], "in float32, too.*: got float 1e.39"),
        ([1, Decimal("1e999"), 3], "in float32, too.*: got Decimal"),
        ([1, Decimal("sNaN"), 3], "in float32, too.*: got Decimal"),
        ([1, 2j, 3], "got complex 2j"),
        ([1, [2.0], 3], r"got list \[2.0\]"),
        ([1, torch.ones(2), 3], "got Tensor tensor"),
        ([1, object(), 3], "got object <object"),
    ],
)
def test_what_is_no_number_is_refused_with_its_place(result, message):
    with pytest.raises(UserError, match=message):
        called(returning(result))


# Where they fail -----------------------------------------------------------------------------------------------------


def raising(error):
    def reward(**_):
        raise error

    return reward


def later(error):
    async def reward(**_):
        await asyncio.sleep(0)
        raise error

    return reward


@pytest.mark.parametrize("make", [raising, later])
@pytest.mark.parametrize(
    "error, message",
    [
        (
            ValueError("the judge\nis out"),
            rf"^the reward 'mine' raised ValueError: the judge is out \({__file__}, line \d+\); "
            r"it was called with 3 completions \(rows 7, 9 of the data set\)$",
        ),
        (ZeroDivisionError(), rf"the reward 'mine' raised ZeroDivisionError \({__file__}, line"),
        (SystemExit(3), r"the reward 'mine' wanted to end the program \(SystemExit: 3\)"),
        (SystemExit(), "the reward 'mine' wanted to end the program"),
        (asyncio.CancelledError(), "the reward 'mine' raised CancelledError"),
        (UserError("the column 'x' is empty"), "^the reward 'mine': the column 'x' is empty$"),
    ],
)
def test_a_reward_that_raises_is_one_sentence(make, error, message):
    with pytest.raises(UserError, match=message):
        called(make(error))


@pytest.mark.parametrize("make", [raising, later])
def test_an_interrupt_passes(make):
    with pytest.raises(KeyboardInterrupt):
        called(make(KeyboardInterrupt()))
    assert called(judged) == [[3.0, 3.0, 5.0]], "the event loop lives on"


def test_a_wrong_call_has_no_line_of_ours():
    with pytest.raises(UserError, match=r"raised TypeError: .*'other'; it was called") as caught:
        called(functools.partial(lambda other, completions: [], completions=[]))
    assert os.path.basename(sys.modules[Calls.__module__].__file__) not in str(caught.value)


# Async ---------------------------------------------------------------------------------------------------------------


async def judged(completions, **_):
    await asyncio.sleep(0)
    return [len(c) for c in completions]


class Judge:
    async def __call__(self, completions, **_):
        return await judged(completions)


def handing_on(**given):
    return judged(**given)


@pytest.mark.parametrize("reward", [judged, Judge(), handing_on, functools.partial(judged, base=1)])
def test_async_rewards_are_awaited(reward):
    assert called(reward) == [[3.0, 3.0, 5.0]]
    assert called(returning([0, 0, 0]), reward, returning([1, 1, 1])) == [[0.0] * 3, [3.0, 3.0, 5.0], [1.0] * 3]


def test_async_rewards_run_side_by_side_in_one_loop_for_ever():
    """Each waits for the other: one after another, they would not end. The event is kept from call to call."""
    met, loops = [], set()

    async def first(**_):
        loops.add(asyncio.get_running_loop())
        met.append(asyncio.Event())
        await asyncio.wait_for(met[-1].wait(), 20)
        return [1.0] * 3

    async def second(**_):
        loops.add(asyncio.get_running_loop())
        while not met:
            await asyncio.sleep(0.001)
        met.pop().set()
        return [2.0] * 3

    for _ in range(2):
        assert called(first, second) == [[1.0] * 3, [2.0] * 3]
    assert len(loops) == 1


def test_async_rewards_work_where_a_loop_runs_already():
    async def notebook():
        return called(judged)

    assert asyncio.run(notebook()) == [[3.0, 3.0, 5.0]]
    assert threading.active_count() >= 2


def test_async_answers_are_held_to_the_same_rules():
    async def short(**_):
        return [1.0]

    with pytest.raises(UserError, match="the reward 'mine' returned 1 numbers for 3 completions"):
        called(short)


def test_nothing_is_left_unawaited_where_a_later_reward_fails():
    waiting = judged([])
    with pytest.raises(UserError, match="'r1' raised ValueError"):
        called(lambda **_: waiting, raising(ValueError("no")))
    assert inspect.getcoroutinestate(waiting) == inspect.CORO_CLOSED
