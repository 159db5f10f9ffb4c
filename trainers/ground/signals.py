"""Signals that end a run in good order: after the step that is being taken, with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STATUS = 75
"""Exit status of a run that a signal ended: all is saved, and the same command with --resume_from_checkpoint latest
goes on (EX_TEMPFAIL of sysexits.h, "try again")."""
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


class Stop:
    """received: the name of the first signal that came; None: none did."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = signal.Signals(number).name
        more = "; a second Ctrl-C ends it now, without one" if number == signal.SIGINT else ""
        with contextlib.suppress(OSError):  # not by print: the signal may have come in the middle of one
            os.write(
                2, f"\nlogratio: {self.received}: the run ends after this step, with a checkpoint{more}\n".encode()
            )


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Inside, the signals of `NAMES` are noted; of a closed terminal, SIGHUP, unless `nohup` has it ignored. Outside of
    the main thread, which alone gets signals, none is."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    kept = {number: signal.getsignal(number) for name in NAMES if (number := getattr(signal, name, None)) is not None}
    if kept.get(signal.SIGHUP) is signal.SIG_IGN:
        del kept[signal.SIGHUP]
    for number in kept:
        signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
