"""Where a reward runs apart from the thread that asks: a thread of its own, or the event loop of those that are async.

Neither keeps the process from ending, and neither ends the process: what is raised there is handed back.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from queue import SimpleQueue
from typing import Any

import torch

from .asked import Reward

Outcome = tuple[Any, BaseException | None]
"""What was returned, or what was raised."""
GRACE_S = 1.0  # for what is cancelled


def is_async(reward: Reward) -> bool:
    """Whether its call only makes a coroutine."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


class Worker:
    """A thread of one reward's own, call after call: what it opens there (a database) may belong to a thread.

    device: the GPU of the process, which a new thread does not know.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Outcome]] | None] = SimpleQueue()
        threading.Thread(target=self._work, name=f"reward {name}", daemon=True).start()

    def start(self, call: Callable[[], Any]) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        self._calls.put((functools.partial(contextvars.copy_context().run, call), future))
        return future

    def close(self) -> None:
        """It ends behind what it is doing."""
        self._calls.put(None)

    def _work(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        while (task := self._calls.get()) is not None:
            call, future = task
            if future.set_running_or_notify_cancel():
                future.set_result(outcome_of(call))
            del task, call, future  # completions are not kept until the next call


def outcome_of(call: Callable[[], Any]) -> Outcome:
    try:
        return call(), None
    except BaseException as error:
        return None, error


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One for the whole process, since what rewards keep (a client, a lock) belongs to a loop; in a thread, since the
    caller may be in a loop of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def in_loop(awaitable: Awaitable[Any]) -> Future[Outcome]:
    async def one() -> Outcome:
        try:
            return await awaitable, None
        except BaseException as error:  # which would end the loop's thread, or be told to nobody
            return None, error

    return asyncio.run_coroutine_threadsafe(one(), _event_loop())


def cancel(futures: list[Future[Outcome]]) -> None:
    """Let go of them: what awaits in the loop is cancelled, what runs in a thread is left alone."""
    if not any([future.cancel() for future in futures if not future.done()]):
        return
    try:
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), _event_loop()).result(GRACE_S)
    except NotYet:  # something blocks the loop, or does not let itself be cancelled: the next ones get another
        _event_loop.cache_clear()
