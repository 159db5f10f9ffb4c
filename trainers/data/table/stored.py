"""Examples that lie in Arrow files: mapped into memory, each built when it is asked for."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, overload

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


class Lists(NamedTuple):
    """A column of lists; valid: which are not null (None: all)."""

    offsets: Any
    values: Any
    valid: Any

    def of(self, i: int) -> Any:
        if self.valid is not None and not self.valid[i]:
            return None
        return self.values[self.offsets[i] : self.offsets[i + 1]]


class Columns(NamedTuple):
    """A record batch, not copied; None: a column without a value."""

    ids: Lists
    lengths: Lists
    row: Any
    label: Any
    margin: Any
    scored: Lists | None
    weights: Lists | None
    rewards: Lists | None
    rest: Lists | None


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
        self._columns: dict[int, Columns] = {}
        self._read = 0

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example | Prompt:
        """index: from 0 to len - 1."""
        self._read += 1
        if self._read % GIVEN_BACK == 0:
            self._give_back()
        batch = bisect_right(self._starts, index) - 1
        columns, i = self._columns.get(batch) or self._load(batch), index - self._starts[batch]
        ids, lengths, row = columns.ids.of(i).tolist(), columns.lengths.of(i).tolist(), int(columns.row[i])
        if columns.rest is not None and (rest := columns.rest.of(i)) is not None:
            prompt, others = from_json(rest.tobytes())
            return Prompt(ids, prompt, others, row)
        cuts = list(accumulate(lengths))
        scored = None if columns.scored is None else columns.scored.of(i)
        weights = None if columns.weights is None else columns.weights.of(i)
        completions = [
            Completion(
                ids[start:end],
                None if scored is None else scored.astype(bool).tolist(),
                None if weights is None else weights.tolist(),
            )
            for start, end in zip(cuts, cuts[1:], strict=False)
        ]
        label, margin = int(columns.label[i]), float(columns.margin[i])
        known = None if math.isnan(margin) else margin
        rewards = None if columns.rewards is None else columns.rewards.of(i)
        rewards = None if rewards is None else tuple(rewards.tolist())
        known_label = None if label < 0 else bool(label)
        return Example(ids[: cuts[0]], completions, known_label, row, margin=known, rewards=rewards)

    def _load(self, number: int) -> Columns:
        batch = self._file.get_batch(number)

        def lists(name: str) -> Lists | None:
            column = batch.column(name)
            if column.null_count == len(column):
                return None
            valid = column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else None
            return Lists(column.offsets.to_numpy(), column.values.to_numpy(), valid)

        ids, lengths = lists("ids"), lists("lengths")
        assert ids is not None and lengths is not None
        row, label, margin = (batch.column(name).to_numpy() for name in ("row", "label", "margin"))
        others = (lists(name) for name in ("scored", "weights", "rewards", "rest"))
        columns = Columns(ids, lengths, row, label, margin, *others)
        self._columns[number] = columns
        return columns

    def _give_back(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


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
