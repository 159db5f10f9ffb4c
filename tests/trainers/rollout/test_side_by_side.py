"""Rewards that run side by side: the same results as one after the other, and a deadline for each."""

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from logratio.trainers.errors import UserError
from logratio.trainers.rollout.calling import Asked, Calls, RewardLog, TrainerState, main_thread
from logratio.trainers.rollout.calling.calls import DRAW

ASKED = Asked(["p", "p", "q"], ["one", "two", "three"], [[1], [2, 2], [3]], {}, [7, 7, 9])
LONG = 60  # seconds, which no test waits for


def called(calls, log=None, **rewards):
    return calls(rewards, ASKED, max_completion_length=10, state=TrainerState(), log=log or RewardLog(3))


def told(timeout=None):
    said = []
    return Calls(timeout=timeout, tell=said.append), said


def quiet(completions, **_):
    return [len(text) for text in completions]


async def later(completions, **_):
    await asyncio.sleep(0)
    return [1.0 for _ in completions]


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


@pytest.fixture
def ended():
    """Set when the test is over: what hangs goes on."""
    event = threading.Event()
    yield event
    event.set()


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


# Deadlines -----------------------------------------------------------------------------------------------------------

LATE = (
    "the reward 'slow' has not answered within 0.2 s (--reward_timeout); it was called with 3 completions (rows 7, 9 "
    "of the data set): allow it a longer time, or let it return None for what takes it too long"
)


def hanging(kind, ended, stopped):
    def reward(**_):
        ended.wait(LONG)
        return [0.0] * 3

    async def awaiting(**_):
        try:
            await asyncio.sleep(LONG)
        finally:
            stopped.append(True)

    async def blocking(**_):
        ended.wait(LONG)

    def lazily(**_):
        return (ended.wait(LONG) for _ in range(3))

    def handing_on(**given):
        return awaiting(**given)

    return {"thread": reward, "async": awaiting, "blocking": blocking, "lazily": lazily, "handing_on": handing_on}[kind]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["thread", "async", "blocking", "lazily", "handing_on"])
def test_one_that_does_not_answer_in_time_is_one_sentence(kind, first, ended):
    calls, stopped = Calls(timeout=0.2), []
    slow = hanging(kind, ended, stopped)
    if not first:
        called(calls, quick=quiet, slow=later if kind in ("async", "blocking") else quiet)
    before = time.monotonic()
    with pytest.raises(UserError) as caught:
        called(calls, quick=quiet, slow=slow)
    assert str(caught.value) == LATE
    assert time.monotonic() - before < 20
    assert stopped == [True] * (kind in ("async", "handing_on")), "what awaits is cancelled"
    assert called(Calls(timeout=LONG), quick=quiet, other=later) == [[3, 3, 5], [1.0] * 3], "others get a loop"


@pytest.mark.parametrize("kind", ["thread", "blocking"])
def test_one_that_computes_on_is_let_go(kind):
    """Torch in a thread that is still at work while the process ends would abort it."""
    threads = []

    def spinning(**_):
        threads.append(threading.current_thread())
        while True:
            torch.ones(9).sum()

    async def blocking(**_):
        spinning()

    with pytest.raises(UserError, match="has not answered within 0.2 s"):
        called(Calls(timeout=0.2), slow=spinning if kind == "thread" else blocking)
    if kind == "thread":
        threads[0].join(20)
        assert not threads[0].is_alive()
    else:  # the loop's own thread is idle again
        loop_stops = time.monotonic() + 20
        while sys._current_frames()[threads[0].ident].f_code.co_name == "spinning" and time.monotonic() < loop_stops:
            time.sleep(0.01)
        assert time.monotonic() < loop_stops


def test_one_that_has_the_thread_that_asks_is_late_when_it_answers():
    slow = main_thread(lambda **_: time.sleep(0.3) or [0.0] * 3)
    with pytest.raises(UserError) as caught:
        called(Calls(timeout=0.2), slow=slow)
    assert str(caught.value) == LATE


def test_one_that_fails_ends_the_wait_for_the_others(ended):
    def failing(**_):
        raise ValueError("no")

    def failing_too(**_):
        raise ValueError("neither")

    calls = Calls(timeout=LONG)
    for turn in (1, 2):
        slow = quiet if turn == 1 else hanging("thread", ended, [])
        bad = quiet if turn == 1 else failing
        if turn == 2:
            with pytest.raises(UserError, match="the reward 'bad' raised ValueError: no "):
                called(calls, slow=slow, bad=bad)
        else:
            called(calls, slow=slow, bad=bad)
    with pytest.raises(UserError, match="the reward 'a' raised ValueError: no "):
        called(Calls(timeout=LONG), a=failing, b=failing_too)


def test_an_interrupt_in_a_thread_passes():
    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        called(Calls(timeout=LONG), a=interrupted)


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="of POSIX")
def test_an_alarm_in_a_thread_is_told_the_remedy():
    def alarmed(**_):
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        return [0.0] * 3

    with pytest.raises(UserError, match=r"so mark it \(REWARD.main_thread = True\), and it is called where it can$"):
        called(Calls(timeout=LONG), a=alarmed)
    assert called(Calls(timeout=LONG), a=main_thread(alarmed)) == [[0.0] * 3]


PROGRAM = """
import time
from logratio.trainers.errors import UserError
from logratio.trainers.ground.signals import stopping
from logratio.trainers.rollout.calling import Asked, Calls, RewardLog, TrainerState

def slow(**_):
    print("asked", flush=True)
    time.sleep(600)

def called(timeout):
    asked = Asked(["p"], ["c"], [[1]], {}, [0])
    Calls(timeout=timeout)({"slow": slow}, asked, max_completion_length=1, state=TrainerState(), log=RewardLog(1))

try:
    called(0.1)
except UserError:
    print("late", flush=True)
with stopping() as stop:
    try:
        called(600.0)
    except KeyboardInterrupt:
        print(stop.received, flush=True)
"""


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_reward_that_hangs_keeps_neither_the_process_nor_a_signal():
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(3)] == ["asked\n", "late\n", "asked\n"]
        process.send_signal(signal.SIGINT)
        lines = iter(process.stderr.readline, "")
        assert any("the run ends after this step" in line for line in lines)
        process.send_signal(signal.SIGINT)  # and now at once
        assert process.stdout.readline() == "SIGINT\n" and process.wait(60) == 0
