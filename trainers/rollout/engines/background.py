"""Work that goes on beside the main thread, which comes for its result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
GOODBYE_S = 5.0  # that the thread may take to end when its result is not wanted any more


class Begun(Future[T]):
    """work(stop) in a thread of its own, begun at once; it touches neither policy nor other processes, and ends soon
    after `stop` is set. seconds: that it took, when it is done."""

    def __init__(self, work: Callable[[threading.Event], T]) -> None:
        super().__init__()
        self.seconds = 0.0
        self._work, self._stop = work, threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampling ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            found = self._work(self._stop)
        except BaseException as error:
            self.seconds = time.perf_counter() - started
            self.set_exception(error)
        else:
            self.seconds = time.perf_counter() - started
            self.set_result(found)

    def stop(self) -> None:
        """The result is not wanted any more."""
        self._stop.set()

    def close(self) -> None:
        """Stop, and wait a little for it."""
        self.stop()
        self._thread.join(GOODBYE_S)
