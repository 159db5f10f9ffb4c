"""A deadline for each reward, and what becomes of one that passes it."""

import asyncio
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from logratio.trainers.errors import UserError
from logratio.trainers.rollout.calling.asked import main_thread
from logratio.trainers.rollout.calling.calls import Calls

from ._called import LONG, called, later, quiet


@pytest.fixture
def ended():
    """Set when the test is over: what hangs goes on."""
    event = threading.Event()
    yield event
    event.set()


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
    assert called(Calls(timeout=20), quick=quiet, other=later) == [[3, 3, 5], [1.0] * 3], "others get a loop"


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

    calls = Calls(timeout=LONG)
    called(calls, slow=quiet, bad=quiet)
    with pytest.raises(UserError, match="the reward 'bad' raised ValueError: no "):
        called(calls, slow=hanging("thread", ended, []), bad=failing)


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


BEGINNING = """
import time
import torch
from logratio.trainers.errors import UserError
from logratio.trainers.ground.signals import stopping
from logratio.trainers.rollout.calling.asked import Asked, RewardLog, TrainerState
from logratio.trainers.rollout.calling.calls import Calls

def called(timeout, reward):
    asked = Asked(["p"], ["c"], [[1]], {}, [0])
    Calls(timeout=timeout)({"slow": reward}, asked, max_completion_length=1, state=TrainerState(), log=RewardLog(1))
"""
WAITS = (
    BEGINNING
    + """
def slow(**_):
    print("asked", flush=True)
    time.sleep(600)

try:
    called(0.1, slow)
except UserError:
    print("late", flush=True)
with stopping() as stop:
    try:
        called(600.0, slow)
    except KeyboardInterrupt:
        print(stop.received, flush=True)
"""
)
COMPUTES = (
    BEGINNING
    + """
def slow(**_):
    weight = torch.ones(64, 64, requires_grad=True)
    while True:
        (weight @ weight).sum().backward()

try:
    called(0.2, slow)
except UserError:
    raise SystemExit(3)
"""
)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_reward_that_hangs_keeps_neither_the_process_nor_a_signal():
    command = [sys.executable, "-c", WAITS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(3)] == ["asked\n", "late\n", "asked\n"]
        process.send_signal(signal.SIGINT)
        lines = iter(process.stderr.readline, "")
        assert any("the run ends after this step" in line for line in lines)
        process.send_signal(signal.SIGINT)  # and now at once
        assert process.stdout.readline() == "SIGINT\n" and process.wait(60) == 0


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_reward_that_computes_on_does_not_abort_the_process():
    done = subprocess.run([sys.executable, "-c", COMPUTES], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
