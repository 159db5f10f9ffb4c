"""One run at a time: a process has one state of accelerate's and of torch's generators, and one place for objects."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from ..errors import UserError

_RUNS = threading.RLock()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, no other thread loads or trains a run; it raises UserError, for what would come of it is another run."""
    if not _RUNS.acquire(blocking=False):
        raise UserError(
            "another thread of this process is loading or training a run, and both would change what they share "
            "(torch's generators, accelerate's state): train one after the other, or in a process each"
        )
    try:
        yield
    finally:
        _RUNS.release()
