"""Rewards that run side by side: the same results as one after the other."""

import asyncio
import decimal
import random
import threading
import time

import numpy as np
import pytest
import torch

from logratio.trainers.errors import UserError
from logratio.trainers.rollout.calling import calls
from logratio.trainers.rollout.calling.asked import RewardLog, main_thread
from logratio.trainers.rollout.calling.calls import DRAW, Calls

from ._called import LONG, called, later, quiet, told


class Meeting:
    """Rewards of which each waits in its second call for all the others of so many."""

    def __init__(self, number):
        self.barrier = threading.Barrier(number)

    def member(self):
        calls = []

        def reward(completions, **_):
            calls.append(threading.get_ident())
            if len(calls) > 1:
                self.barrier.wait(20)
            return [len(calls)] * 3

        reward.threads = calls
        return reward


# Side by side --------------------------------------------------------------------------------------------------------


def test_with_a_deadline_each_has_a_thread_of_its_own_call_after_call():
    meeting, calls = Meeting(2), Calls(timeout=LONG)
    one, two = meeting.member(), meeting.member()
    for turn in (1, 2, 3):
        assert called(calls, one=one, two=two, three=later) == [[turn] * 3, [turn] * 3, [1.0] * 3]
    assert len(set(one.threads)) == len(set(two.threads)) == 1
    assert len({*one.threads, *two.threads, threading.get_ident()}) == 3


def test_an_async_one_runs_beside_those_of_the_thread_that_asks():
    """Each waits for the other in its second call."""
    started, seen, calls = [], threading.Event(), Calls()

    async def judge(**_):
        started.append(asyncio.Event())
        while len(started) > 1 and not seen.is_set():
            await asyncio.sleep(0.001)
        return [1.0] * 3

    def here(**_):
        assert threading.current_thread() is threading.main_thread()
        limit = time.monotonic() + 20
        while started and len(started) < 2 and time.monotonic() < limit:
            time.sleep(0.001)
        seen.set()
        return [float(len(started))] * 3

    assert called(calls, here=here, judge=judge) == [[0.0] * 3, [1.0] * 3]
    seen.clear()
    assert called(calls, here=here, judge=judge) == [[2.0] * 3, [1.0] * 3]


def test_without_a_deadline_and_where_it_is_marked_a_reward_has_the_thread_that_asks():
    def mine(**_):
        return [float(threading.current_thread() is threading.main_thread())] * 3

    for _ in range(2):
        assert called(Calls(), a=mine) == [[1.0] * 3]
    calls = Calls(timeout=LONG)
    marked = main_thread(lambda **given: mine(**given))
    for _ in range(2):
        assert called(calls, a=mine, b=marked, c=later) == [[0.0] * 3, [1.0] * 3, [1.0] * 3]


def test_another_thread_has_the_gpu_of_the_process_and_what_its_context_says(monkeypatch):
    states, set_for = calls.random_states, {}
    monkeypatch.setattr(calls, "random_states", lambda device: states(torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: set_for.update({threading.get_ident(): device}))
    gpu = torch.device("cuda", 1)

    def own(**_):
        assert set_for[threading.get_ident()] == gpu
        return [decimal.getcontext().prec] * 3

    async def awaited(**_):
        return own()

    with decimal.localcontext() as context:
        context.prec = 7
        assert called(Calls(timeout=LONG, device=gpu), a=own, b=awaited) == [[7.0] * 3] * 2
        set_for.clear()
        assert called(Calls(device=gpu), a=lambda **_: awaited()) == [[7.0] * 3]
        assert threading.get_ident() not in set_for


def test_what_is_logged_stands_in_the_order_of_the_functions():
    first_may_go = threading.Event()

    def first(log_metric, log_extra, **_):
        first_may_go.wait(20)
        log_metric("seen", 1.0)
        log_extra("a", list("xyz"))
        return [0.0] * 3

    def second(log_metric, log_extra, **_):
        log_metric("seen", 2.0)
        log_extra("b", list("uvw"))
        first_may_go.set()
        return [0.0] * 3

    calls = Calls(timeout=LONG)
    first_may_go.set()
    called(calls, first=first, second=second)
    first_may_go.clear()
    log = RewardLog(3)
    called(calls, log, first=first, second=second)
    assert log.metrics == {"seen": [1.0, 2.0]} and list(log.columns) == ["a", "b"]


def test_two_rewards_cannot_fill_one_column_with_different_values():
    def one(log_extra, **_):
        log_extra("verdict", [1, 2, 3])
        return [0.0] * 3

    def two(log_extra, **_):
        log_extra("verdict", [1, 2, 4])
        return [0.0] * 3

    with pytest.raises(UserError) as caught:
        called(Calls(timeout=LONG), one=one, two=two)
    said = "log_extra('verdict', ...) was given other values before: choose another name"
    assert str(caught.value) == f"the reward 'two': {said}"


# Random numbers ------------------------------------------------------------------------------------------------------


def of_python(**_):
    time.sleep(0.02)  # side by side it would come last
    return [random.random() + np.random.rand() for _ in range(3)]


def of_all(**_):
    return [random.random() + np.random.rand() + float(torch.rand(())) for _ in range(3)]


async def awaited(**_):
    return [random.random() for _ in range(3)]


@pytest.mark.parametrize("timeout", [None, LONG])
def test_rewards_that_draw_have_the_numbers_that_they_have_one_after_the_other(timeout):
    def seed():
        random.seed(1), np.random.seed(2), torch.manual_seed(3)

    seed()
    expected = [[of_python(), of_all(), asyncio.run(awaited())] for _ in range(3)]
    seed()
    calls, said = told(timeout)
    slow = Meeting(1).member()
    found = [
        called(calls, later=later, one=of_python, quiet=quiet, two=of_all, slow=slow, last=awaited) for _ in range(3)
    ]
    assert [[each[1], each[3], each[5]] for each in found] == expected
    assert calls.drawing == {"one", "two", "last", "later"} and not said, "async ones are judged together"


def test_in_the_thread_that_asks_the_order_is_that_of_the_functions():
    """Whichever draws: a run that goes on has its first call in the middle, and the same numbers."""
    said, calls = [], Calls()

    def drawing(**_):
        said.append(random.random())
        return [0.0] * 3

    def other(**_):
        said.append("other")
        return [0.0] * 3

    for _ in range(2):
        called(calls, a=drawing, b=other)
    assert [isinstance(each, float) for each in said] == [True, False] * 2


def test_one_that_draws_for_the_first_time_beside_others_is_told():
    turns = []

    def now_and_then(**_):
        turns.append(random.random() if turns else 0.0)
        return [0.0] * 3

    calls, said = told(LONG)
    for _ in range(2):
        called(calls, a=now_and_then, b=quiet)
    assert said == [DRAW]
    turns.clear()
    calls, said = told()
    for _ in range(2):
        called(calls, a=now_and_then, b=quiet)
    assert not said, "they run one after the other"
