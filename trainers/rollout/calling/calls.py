"""One call of all rewards: side by side where they can be, with the same results as one after the other."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import UserError
from ...ground.randomness import as_json, random_states
from .apart import Outcome, Worker, abandon, cancel, in_loop, is_async, outcome_of
from .asked import Asked, Reward, RewardLog, TrainerState, unwrapped
from .said import FAILURES, failed, late, numbers

TICK_S = 0.1  # between two looks at the clock; and a signal that comes just before a wait is seen behind it
DRAW = (
    "rewards drew from the random numbers that all share (of random, numpy or torch) while others ran beside them, so "
    "that which of them got which is chance, and the run cannot be repeated bit by bit: let a reward that draws have a "
    "generator of its own, as random.Random(seed)"
)


@dataclass
class Call:
    """Of one reward. reward: without partials. future: of its outcome, once it has begun elsewhere."""

    name: str
    reward: Reward
    question: Callable[[], Any]
    log: RewardLog
    future: Future[Outcome] | None = None
    since: float = 0.0
    result: Any = None


class Calls:
    """Calls a run's rewards, each once for all completions.

    An async one runs in an event loop, beside all others. Another one runs in the thread that asks, one after the
    other, as in TRL; with a `timeout` it runs in a thread of its own, beside all others, unless it is marked
    (`main_thread`). One that draws from random numbers that all share does so in the order of the functions: the first
    call asks one after the other and sees which draw; from then on, where any runs elsewhere, these wait until the
    others are done.

    timeout: in seconds, of each reward. device: the GPU of the process. tell: called with what the user should know.
    """

    def __init__(
        self,
        *,
        timeout: float | None = None,
        device: torch.device | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.timeout, self.tell = timeout, tell
        self.device = device or torch.device("cpu")
        self.drawing: set[str] | None = None  # None: not known yet
        self.workers: dict[str, Worker] = {}

    def __call__(
        self,
        rewards: Mapping[str, Reward],
        asked: Asked,
        *,
        max_completion_length: int,
        state: TrainerState,
        log: RewardLog,
    ) -> list[list[float | None]]:
        """What each reward says of every completion; None where it has no opinion.

        log: what they log is added to it, in their order. Raises UserError where one fails, is late, or answers with
        anything but a finite number or None for each completion.
        """
        more = {"max_completion_length": max_completion_length, "trainer_state": state}
        calls = []
        for name, reward in rewards.items():
            own = RewardLog(len(asked.completions))
            calls.append(Call(name, unwrapped(reward), asked.question(reward, own, **more), own))
        try:
            self._all(calls, asked)
        finally:
            running = {call.future: call.name for call in calls if call.future is not None}
            left = cancel(list(running))
            abandon({future: self.workers.pop(running[future]) for future in left if running[future] in self.workers})
        for call in calls:
            try:
                log.add(call.log)
            except UserError as error:
                raise failed(call.name, error, asked) from error
        return [numbers(call.name, call.result, asked) for call in calls]

    def close(self) -> None:
        """No reward is called any more."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def _all(self, calls: Sequence[Call], asked: Asked) -> None:
        if self.drawing is None:
            self.drawing = self._in_order(calls, asked)
            return
        beside = [call for call in calls if call.name not in self.drawing]
        before = self._random()
        self._begin(beside, asked)
        at_once = len(beside) > 1 and any(call.future for call in beside)
        self._end(beside, asked)
        if at_once and self._random() != before:
            self.tell(DRAW)
        self._in_order([call for call in calls if call.name in self.drawing], asked)

    def _in_order(self, calls: Sequence[Call], asked: Asked) -> set[str]:
        """One after the other, but for async ones, which run side by side at the end. The names of those that drew;
        none where all have the thread that asks, and so an order in any case."""
        waiting = [call for call in calls if is_async(call.reward)]
        each = [[call] for call in calls if call not in waiting]
        drew: set[str] = set()
        apart = False
        for group in [*each, waiting]:
            before = self._random()
            self._begin(group, asked)
            apart = apart or any(call.future for call in group)
            self._end(group, asked)
            if self._random() != before:
                drew |= {call.name for call in group}
        return drew if apart else set()

    def _begin(self, calls: Sequence[Call], asked: Asked) -> None:
        """Let those begin that run elsewhere, and ask the others."""
        here = []
        for call in calls:
            call.since = time.monotonic()
            if is_async(call.reward):
                call.future = in_loop(self._there(call.question))
            elif self.timeout is None or getattr(call.reward, "main_thread", False):
                here.append(call)
            else:
                if call.name not in self.workers:
                    self.workers[call.name] = Worker(call.name)
                call.future = self.workers[call.name].start(self._there(call.question))
        for call in here:
            call.since = time.monotonic()
            self._settle(call, outcome_of(call.question), asked)
            if self.timeout is not None and time.monotonic() - call.since > self.timeout:
                raise late(call.name, self.timeout, asked)

    def _settle(self, call: Call, outcome: Outcome, asked: Asked) -> None:
        """Take what it returned, or let that be awaited; raise what it raised."""
        result, error = outcome
        if isinstance(error, FAILURES):
            raise failed(call.name, error, asked) from error
        if error is not None:
            raise error
        call.future = None
        if inspect.isawaitable(result):
            call.future = in_loop(self._there(lambda: result))
        else:
            call.result = result

    def _end(self, calls: Sequence[Call], asked: Asked) -> None:
        """Wait for those that run elsewhere; of several that fail at a time the first one's error is raised."""
        while running := {call.future: call for call in calls if call.future is not None}:
            done, _ = wait(running, TICK_S, FIRST_COMPLETED)
            first = min(running.values(), key=lambda call: call.since)
            if not done and self.timeout is not None and time.monotonic() - first.since > self.timeout:
                raise late(first.name, self.timeout, asked)
            for future, call in running.items():
                if future in done:
                    self._settle(call, future.result(), asked)

    def _there(self, question: Callable[[], Any]) -> Callable[[], Any]:
        """The same, in another thread, which does not know the GPU of the process."""

        def ask() -> Any:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            return question()

        return ask

    def _random(self) -> Any:
        """All states of random numbers that the process shares, to compare."""
        return as_json(random_states(self.device))
