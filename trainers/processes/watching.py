"""One process that fails ends all: the others are told, say which it was, and do not wait for it.

A launcher ends the others of its machine once one has gone with an error, but in the meantime they wait in a collective
for as long as its time limit (`--ddp_timeout`), or raise that a connection was closed, without a word of whose. So each
process has a thread that asks the launcher's store, twice a second, whether another has failed, and says that it is
there itself; whoever finds a collective broken looks there for the process that did not come.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from accelerate import Accelerator

from ..errors import Stopped, UserError, first_line

INTERVAL = 0.5  # seconds between two looks
GRACE = 5.0  # seconds in which the others are waited for to say something, or to end by themselves
# What collectives raise when another process is not there, or does not come; beside `DistError`.
BROKEN = re.compile(r"gloo|NCCL|c10d|ProcessGroup")


class Watch:
    """Of one process over the others.

    store: what all of them read and write, under names of this run alone. timeout: of a collective, in seconds.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout: int) -> None:
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.said = False  # that another one has failed
        self.stopped = threading.Event()
        self.lock = threading.Lock()  # of the store's connection, and of `said`
        self.thread = threading.Thread(target=self._look, daemon=True, name="watch over the other processes")

    def start(self) -> Watch:
        self.thread.start()
        return self

    def stop(self) -> None:
        """For good; whoever holds the process up after this is not told."""
        self.stopped.set()
        if self.thread.is_alive() and self.thread is not threading.current_thread():
            self.thread.join(GRACE)  # one that still asks the store when the process ends would abort it

    def _look(self) -> None:
        beat = 0
        with contextlib.suppress(Exception):  # the store has gone: with the launcher, or with a run that has ended
            while not self.stopped.wait(INTERVAL):
                beat += 1
                self._write(f"beat/{self.rank}", str(beat))
                if (failure := self._failure()) is not None and failure[0] != self.rank:
                    self._end(failure)
                    return

    def _end(self, failure: tuple[int, str]) -> None:
        """Say why, let the failed process go first, and leave, wherever the main thread is."""
        with self.lock:
            if self.stopped.is_set():  # the main thread is on its way out itself
                return
            self.said = True
        say(self.sentence(failure))
        self._write(f"told/{self.rank}", "")
        time.sleep(GRACE)
        if not self.stopped.is_set():
            os._exit(1)

    def _write(self, name: str, value: str) -> None:
        with self.lock:
            self.store.set(name, value)

    def _read(self, name: str) -> str | None:
        with self.lock:
            return self.store.get(name).decode() if self.store.check([name]) else None

    def _failure(self) -> tuple[int, str] | None:
        said = self._read("failed")
        return None if said is None else tuple(json.loads(said))

    def sentence(self, failure: tuple[int, str]) -> str:
        return f"process {self.rank} of {self.world} ends, because process {failure[0]} failed: {failure[1]}"

    def failed(self, error: BaseException) -> BaseException:
        """The main thread has come to its end with `error`: tell the others, or find out which of them it comes from.

        Returns what to raise in its place.
        """
        try:
            if comes_from_others(error):
                return self._consequence(error)
            self._tell(error)
        except Exception:  # of a store that has gone
            pass
        return error

    def _tell(self, error: BaseException) -> None:
        """Enter the failure, unless another was first, and wait a little for the others to say so."""
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
        self._write(f"told/{self.rank}", "")
        with self.lock:
            self.store.compare_set("failed", "", json.dumps([self.rank, message]))
        self._wait(lambda: not self._missing("told"))

    def _consequence(self, error: BaseException) -> BaseException:
        self._write(f"broken/{self.rank}", "")
        before = self._beats()
        self._wait(lambda: self.said or self._failure() is not None or not self._missing("broken"))
        if self.said:
            return SystemExit(1)  # it has been explained
        if (failure := self._failure()) is not None:
            return UserError(self.sentence(failure))
        missing, after = self._missing("broken"), self._beats()
        if gone := [rank for rank in missing if before[rank] == after[rank]]:
            return UserError(f"{named(gone, self.world)} gone without a word (killed, or out of memory?)")
        if missing:
            return UserError(
                f"{named(missing, self.world)} still busy, or hanging, where the others have waited for "
                f"{self.timeout} s (--ddp_timeout)"
            )
        return error

    def _wait(self, until: Callable[[], bool]) -> None:
        limit = time.monotonic() + GRACE
        while not until() and time.monotonic() < limit:
            time.sleep(0.1)

    def _missing(self, what: str) -> list[int]:
        """The processes that have not entered this."""
        return [rank for rank in range(self.world) if self._read(f"{what}/{rank}") is None]

    def _beats(self) -> list[str | None]:
        return [self._read(f"beat/{rank}") for rank in range(self.world)]


WATCHES: list[Watch] = []
"""Those of this interpreter's runs, of which only the last watches."""


def watch_over(accelerator: Accelerator, timeout: int) -> None:
    """Let a thread watch over the other processes, where there are any and they share a store."""
    from torch.distributed import PrefixStore, TCPStore

    for earlier in WATCHES:
        earlier.stop()
    if accelerator.num_processes == 1:
        return
    try:  # a connection of its own: the other one's owner may wait in it
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=30))
        prefixed = PrefixStore(f"logratio/{len(WATCHES)}", store)
        WATCHES.append(Watch(prefixed, accelerator.process_index, accelerator.num_processes, timeout).start())
        atexit.register(WATCHES[-1].stop)  # of a run that nobody has ended (`ending_together`)
    except (KeyError, ValueError, RuntimeError):  # processes that met in another way (MPI, a file)
        return


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Inside, whatever ends this process with an error ends the others of its run, which say which one it was."""
    known = len(WATCHES)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if len(WATCHES) == known or isinstance(error, Stopped):  # all of them stop
            raise
        raised = WATCHES[-1].failed(error)
        if raised is error:
            raise
        raise raised from error
    finally:
        for watch in WATCHES[known:]:
            watch.stop()


def comes_from_others(error: BaseException) -> bool:
    """Whether a collective raised it because another process was not there."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and bool(BROKEN.search(str(error))))


def named(ranks: list[int], world: int) -> str:
    many = len(ranks) > 1
    return f"process{'es' if many else ''} {', '.join(map(str, ranks))} of {world} {'are' if many else 'is'}"


def say(text: str) -> None:
    """In one piece, past whatever the main thread is doing."""
    if sys.stderr is not None:
        shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # the cursor, which a progress line hides
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{shown}logratio: {text}\n")
            sys.stderr.flush()
