"""Examples that lie in Arrow files: mapped into memory, each built when it is asked for."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from ..types import Completion, Example, Prompt
from .extremes import Extremes
from .values import from_json
from .writer import END, MARK

# Pages of the file that were read count as the process's memory until they are given back, to be read again out of the
# system's cache: after so many examples.
GIVEN_BACK = 128
CHUNK = 1 << 20  # bytes


def is_whole(path: Path) -> bool:
    """Whether the file still holds what `TableWriter` wrote, read once from end to end."""
    left = path.stat().st_size - 32  # the hash
    found = hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, CHUNK))):
            found.update(chunk)
            left -= len(chunk)
        return left == 0 and file.read() == found.digest()


class Table:
    """A file of `TableWriter` that is whole, of `size` bytes; about: what it says of itself."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self._map)
        mark, arrow, _ = END.unpack(self._map[-END.size :])
        if mark != MARK:
            raise ValueError(f"{path} is no table")
        self.about: dict[str, Any] = json.loads(self._map[arrow : -END.size])
        self._file = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map).slice(0, arrow)))
        self._starts = [0, *accumulate(self.about["batches"])]
        token, sequence, prompt, completion = self.about["extremes"]
        self.extremes = Extremes(tuple(token), tuple(sequence), tuple(prompt), completion)
        self._batches: dict[int, dict[str, pa.Array]] = {}  # their columns, not copied
        self._read = 0

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example | Prompt:
        """index: from 0 to len - 1."""
        self._read += 1
        if self._read % GIVEN_BACK == 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        number = bisect_right(self._starts, index) - 1
        if number not in self._batches:
            batch = self._file.get_batch(number)
            self._batches[number] = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns, i = self._batches[number], index - self._starts[number]

        def listed(name: str) -> Any:
            values = columns[name][i].values
            return None if values is None else values.to_numpy().tolist()

        row, label, margin = (columns[name][i].as_py() for name in ("row", "label", "margin"))
        ids, (prompt, *lengths) = listed("ids"), listed("lengths")
        if (rest := listed("rest")) is not None:
            said, kept = from_json(bytes(rest))
            return Prompt(ids, said, kept, row)
        scored, weights, rewards = listed("scored"), listed("weights"), listed("rewards")
        scored = None if scored is None else list(map(bool, scored))
        cuts = pairwise(accumulate(lengths, initial=prompt))
        return Example(
            ids[:prompt],
            [Completion(ids[start:end], scored, weights) for start, end in cuts],
            None if label < 0 else bool(label),
            row,
            margin=None if math.isnan(margin) else margin,
            rewards=None if rewards is None else tuple(rewards),
        )


class Row(int):
    """A row's number among those of several data sets; written as the number in its own, with that one's name."""

    own: int
    name: str

    @classmethod
    def of(cls, own: int, before: int, name: str) -> Row:
        """before: how many rows the data sets in front of it have."""
        row = cls(before + own)
        row.own, row.name = own, name
        return row

    def __str__(self) -> str:
        return f"{self.own} ({self.name})"


class Examples(Sequence[Any]):
    """Examples, or prompts, of one table or of several one behind the other.

    names: of the tables' data sets. chosen: which of all there are, in this order; None: all.
    """

    def __init__(self, tables: Sequence[Table], names: Sequence[str], chosen: Any = None) -> None:
        self.tables, self.names, self.chosen = tables, names, chosen
        self.starts = [0, *accumulate(map(len, tables))]
        self._rows_before = [0, *accumulate(table.about["rows"] for table in tables)]

    def __len__(self) -> int:
        return self.starts[-1] if self.chosen is None else len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        at = range(len(self))[index]
        return self._built(at if self.chosen is None else int(self.chosen[at]))

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))

    def take(self, indices: Sequence[int]) -> Examples:
        """These of them, in this order; nothing is read for it."""
        wanted = np.asarray(indices, dtype=np.int64)
        return Examples(self.tables, self.names, wanted if self.chosen is None else self.chosen[wanted])

    def _built(self, index: int) -> Any:
        if len(self.tables) == 1:
            return self.tables[0][index]
        number = bisect_right(self.starts, index) - 1
        made = self.tables[number][index - self.starts[number]]
        row = self._row(number, made.row)
        return replace(made, row=row)

    def _row(self, number: int, row: int) -> int:
        return row if len(self.tables) == 1 else Row.of(row, self._rows_before[number], self.names[number])

    @property
    def extremes(self) -> Extremes:
        """Of the tables as wholes."""
        found = Extremes()
        for number, table in enumerate(self.tables):
            found |= table.extremes.in_rows(lambda row, number=number: self._row(number, row))  # type: ignore[misc]
        return found

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the examples and their order."""
        chosen = None if self.chosen is None else hashlib.sha256(np.ascontiguousarray(self.chosen).data).hexdigest()
        said = [*(table.about["digest"] for table in self.tables), chosen]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()
