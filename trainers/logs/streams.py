"""Standard output and error that a run outlives: a reader that goes away (`| head -1`), a closed terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Lasting:
    """A text stream that writes into nothing from the first failure on, instead of raising."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text) or 0)
        except UnicodeEncodeError:  # a file's name that is no text, in a locale that is not UTF-8, ...
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            self.give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self.give_up()

    def give_up(self) -> None:
        """Let the stream lead nowhere."""
        # Not only for us: the interpreter flushes what is left at its exit, and libraries write to the descriptor.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, nothing that prints to `sys.stdout` or `sys.stderr` fails because nobody reads it."""
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream if stream is None else Lasting(stream) for stream in kept)  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Lasting):
                stream.flush()
        sys.stdout, sys.stderr = kept
