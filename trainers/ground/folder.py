"""The working directory, which others' code may change."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def staying(moved: Callable[[], None]) -> Iterator[None]:
    """The process is where it was at the end, whatever ran inside; `moved` is called where that had left it. By it a
    relative --output_dir is found again, and data that is read as it is needed."""
    try:
        here = os.getcwd()
    except OSError:  # it was deleted before
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if not _is_at(here):
                os.chdir(here)
                moved()


def _is_at(folder: str) -> bool:
    try:
        return os.getcwd() == folder
    except OSError:  # it is gone, as a temporary one is behind its `with`
        return False
