"""A log of steps, a JSON line each, whose last line says whether two runs were the same.

Every line has a hash over the one before it and its own figures, but for those that are of the machine (`TIMED`). A
disk that takes no more costs no run: lines wait until it does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

TIMED = ("tokens_per_s", "step_ms", "peak_mem_mib", "rollout_ms", "rollout_tokens_per_s", "rollout_wait_ms")


def chained(previous: str, row: Mapping[str, Any]) -> str:
    """The hash of a line: sha256 of the one before it and of its figures, 32 hex digits."""
    figures = {k: v for k, v in row.items() if k not in TIMED and k != "hash"}
    return hashlib.sha256((previous + json.dumps(figures)).encode()).hexdigest()[:32]


def read_chain(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, bytes up to its line's end) as long as the chain holds; a line that was cut off ends it."""
    previous, end = "", 0
    with path.open("rb") as file:
        for line in file:
            end += len(line)
            try:
                row = json.loads(line)
                if not line.endswith(b"\n") or row["hash"] != chained(previous, row):
                    return
            except (ValueError, KeyError, TypeError):
                return
            previous = row["hash"]
            yield row, end


class Journal:
    """Lines are appended, in the order given, each of them whole.

    after: (step, hash) of the line behind which it goes on; what follows in the file is cut off. None: from the
    beginning. Raises UserError where the file has no such line.
    """

    def __init__(self, path: Path, after: tuple[int, str] | None = None) -> None:
        self.path, self.hash, self.size = path, "", 0
        self.last: dict[str, Any] = {}  # the line behind which it goes on
        if after is not None:
            self._seek(*after)
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        os.ftruncate(self.file, self.size)
        self.waiting = b""
        self.problem: str | None = None  # why lines wait

    def _seek(self, step: int, known: str) -> None:
        try:
            found = next(((row, end) for row, end in read_chain(self.path) if row["step"] == step), None)
        except OSError as error:
            remedy = "put the metrics.jsonl of the checkpoint's run beside the checkpoint"
            raise UserError(
                f"{self.path}, behind which the run goes on, cannot be read: {error.strerror}; {remedy}"
            ) from error
        if found is None or found[0]["hash"] != known:
            raise UserError(
                f"{self.path} is not the log of the run that goes on: up to step {step} it has other lines than were "
                "written; put it back, or start a new run in another --output_dir"
            )
        (self.last, self.size), self.hash = found, known

    def append(self, row: Mapping[str, Any]) -> None:
        """Write the row with its hash; where the disk does not take it, with the next one."""
        self.hash = chained(self.hash, row)
        self.waiting += (json.dumps({**row, "hash": self.hash}) + "\n").encode()
        self.write()

    def write(self) -> None:
        """Write what waits, or none of it."""
        try:
            written = 0
            while written < len(self.waiting):
                written += os.pwrite(self.file, self.waiting[written:], self.size + written)
        except OSError as error:
            os.ftruncate(self.file, self.size)
            self.problem = error.strerror
            return
        self.size += len(self.waiting)
        self.waiting, self.problem = b"", None

    def flush(self) -> None:
        """Let all of it be on the disk. Raises UserError where lines still wait."""
        self.write()
        if self.waiting:
            raise UserError(f"{self.path} could not be written: {self.problem}")
        os.fsync(self.file)

    def close(self) -> None:
        self.write()
        os.close(self.file)
