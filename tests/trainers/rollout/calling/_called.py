"""Rewards called in the ways of `Calls`, on three completions."""

import asyncio

from logratio.trainers.rollout.calling.asked import Asked, RewardLog, TrainerState
from logratio.trainers.rollout.calling.calls import Calls

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
