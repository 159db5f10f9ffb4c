"""Where a reward runs apart from the thread that asks: a thread of its own, or the event loop of those that are async.

Neither keeps the process from ending, and neither ends the process: what is raised there is handed back.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as NotYet
from queue import SimpleQueue
from typing import Any

from .asked import Reward

Outcome = tuple[Any, BaseException | None]
"""What was returned, or what was raised."""
GRACE_S = 0.5  # for what is cancelled


class LetGo(BaseException):
    """Raised in a thread whose answer nobody waits for any more."""


def let_go(thread: threading.Thread) -> None:
    """End what the thread is doing, at its next line of Python: one that went on to compute while the process ends
    would abort it."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(LetGo))


def is_async(reward: Reward) -> bool:
    """Whether its call only makes a coroutine."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)


class Worker:
    """A thread of one reward's own, call after call: what it opens there (a database) may belong to a thread."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Outcome]] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, name=f"reward {name}", daemon=True)
        self.thread.start()

    def start(self, call: Callable[[], Any]) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        self._calls.put((functools.partial(contextvars.copy_context().run, call), future))
        return future

    def close(self) -> None:
        """It ends behind what it is doing."""
        self._calls.put(None)

    def _work(self) -> None:
        with contextlib.suppress(LetGo):  # which may come when all is done
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
def _event_loop() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """One for the whole process, since what rewards keep (a client, a lock) belongs to a loop; in a thread, since the
    caller may be in a loop of its own."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        with contextlib.suppress(LetGo):
            loop.run_forever()

    thread = threading.Thread(target=run, name="rewards", daemon=True)
    thread.start()
    return loop, thread


def in_loop(call: Callable[[], Awaitable[Any]]) -> Future[Outcome]:
    async def one() -> Outcome:
        try:
            return await call(), None
        except BaseException as error:  # which would end the loop's thread, or be told to nobody
            return None, error

    return asyncio.run_coroutine_threadsafe(one(), _event_loop()[0])


def cancel(futures: list[Future[Outcome]]) -> list[Future[Outcome]]:
    """Let go of what awaits in the loop; returns those that run in a thread."""
    left = [future for future in futures if not future.done() and not future.cancel()]
    if any(future.cancelled() for future in futures):
        loop, thread = _event_loop()
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(GRACE_S)
        except NotYet:  # something blocks the loop: the next ones get another
            let_go(thread)
            _event_loop.cache_clear()
    return left


def abandon(workers: dict[Future[Outcome], Worker]) -> None:
    """Let go of what runs in these threads, which end; one that waits outside of Python is left alone."""
    for worker in workers.values():
        let_go(worker.thread)
        worker.close()
    wait(workers, GRACE_S)
