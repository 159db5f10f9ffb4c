"""completions.parquet: a folder with a part for each step that sampled, which `pyarrow.parquet.read_table` and
`pandas.read_parquet` read as one table.

A part is written beside its place, flushed and renamed: a run that is killed leaves whole parts. One that goes on
removes those of the steps that it takes again, so that every step is there once. A disk that takes no more costs no
run: parts wait until it does.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError

FOLDER = "completions.parquet"
NAME = re.compile(r"step-(\d+)\.parquet")
WHOLE = ("step", "row", "completion_length", "policy_version")
REAL = ("reward", "advantage", "sampler_logp", "logp_diff")


class CompletionParts:
    """The folder in a run's. after: the step behind which the run goes on; None: it begins, in no folder yet."""

    def __init__(self, folder: Path, after: int | None = None) -> None:
        self.path = folder / FOLDER
        self.waiting: dict[int, list[dict[str, Any]]] = {}
        self.problem: str | None = None  # why parts wait
        self.columns: list[str] | None = None  # of the first part, which a reader takes for those of all
        for path in self.path.glob("*") if after is not None else ():
            found = NAME.fullmatch(path.name)
            if found is None or int(found[1]) > (after or 0):
                path.unlink()

    def add(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows of a step; where the disk does not take them, with the next ones."""
        if rows:
            self.waiting[step] = list(rows)
        self.write()

    def write(self) -> None:
        """Write what waits, as far as the disk takes it."""
        try:
            for step in sorted(self.waiting):
                self._write(step, self.waiting[step])
                del self.waiting[step]
        except OSError as error:
            self.problem = error.strerror or str(error)
            return
        self.problem = None

    def flush(self) -> None:
        """Let all of it be on the disk. Raises UserError where parts still wait."""
        self.write()
        if self.waiting:
            raise UserError(f"{self.path} could not be written: {self.problem}")

    def _write(self, step: int, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa

        self.path.mkdir(exist_ok=True)
        names = list(dict.fromkeys(name for row in rows for name in row))
        if self.columns is None and (parts := self.parts()):
            self.columns = _read(parts[0]).column_names
        if self.columns is not None and (new := [name for name in names if name not in self.columns]):
            first = _read(self.parts()[0])
            for name in new:
                first = first.append_column(name, pa.nulls(len(first), _type(name)))
            _replace(self.parts()[0], first)
            self.columns = first.column_names
        schema = pa.schema([(name, _type(name)) for name in names])
        _replace(self.path / f"step-{step:06d}.parquet", pa.Table.from_pylist(rows, schema))
        self.columns = self.columns or names

    def parts(self) -> list[Path]:
        """In the order of their steps, which is that of their names as long as these are equally long."""
        return sorted(path for path in self.path.glob("*.parquet") if NAME.fullmatch(path.name))


def _type(name: str) -> Any:
    import pyarrow as pa

    if name in WHOLE:
        return pa.int64()
    return pa.float64() if name in REAL or name.startswith("rewards/") else pa.string()


def _read(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read()


def _replace(path: Path, table: Any) -> None:
    """Let the file be this table, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    partial = path.with_name(f".{path.name}.partial")  # which readers of the folder pass over
    try:
        with partial.open("wb") as file:
            file.write(sink.getvalue())
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
