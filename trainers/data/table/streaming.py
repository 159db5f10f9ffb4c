"""A data set that is never kept: its rows are read anew in every epoch, shuffled within a buffer, and tokenized as they
are drawn.

Drawing: the first rows of an epoch fill the buffer; each further row takes the place of one that is drawn from it; when
no row is left, the buffer is emptied in random order. What is drawn depends on the seed and the epoch alone, so that to
go on where a run was left the rows before are read again, and not tokenized.

Differs from a table: steps run on over the end of an epoch; pairs for a kind of labeled rows become their two examples
one behind the other; and rows are tokenized by every process, which all see the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from ...errors import UserError
from ..examples import Preparation
from ..report import Report
from ..rows import Rows
from .extremes import Extremes, extremes_of

LOOKED_AT = 1000  # rows that the options and the model are checked by, before training
TOGETHER = 200  # rows that are tokenized at a time

Position = dict[str, int]
Numbered = tuple[int, int | None, Any]


class Stream(Sequence[Any]):
    """All examples of a data set, through `batches`. As a sequence it is those of its first rows alone, by which the
    options and the model are checked.

    epoch_size: of how many examples the run makes an epoch, since nobody knows how many there are. report: of the rows
    so far. check: called with what each batch of rows becomes.
    """

    def __init__(self, rows: Rows, prepare: Callable[[Rows], Preparation], *, buffer: int, epoch_size: int) -> None:
        self.rows, self.buffer, self.epoch_size = rows, buffer, epoch_size
        head = list(islice(self._numbered(), LOOKED_AT))
        if not head:
            raise UserError(f"{rows.name} has no rows")
        self._preparation = prepare(self._drawn(head))
        self._first = self._made(head)
        self._preparation.report.check_left(self._preparation.max_length)
        self.report = Report(rows)
        self.check: Callable[[Extremes], Any] = lambda found: None

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, index: Any) -> Any:
        return self._first[index]

    def fingerprint_with(self, options: dict[str, Any]) -> str:
        """SHA-256 of the first examples, and of all that decides on the others but the rows themselves."""
        extremes = [str(example) for example in self._first]
        said = [self.rows.name, self.buffer, {name: str(value) for name, value in options.items()}, extremes]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def batches(
        self, batch_size: int, *, shuffle: bool, seed: int, start: Position | None = None
    ) -> Iterator[tuple[list[Any], Position]]:
        """As `setup.batches`. A position: so many rows of an epoch drawn before the last one, and how many examples
        were taken of that."""
        position = start or {"epoch": 0, "rows": 0, "made": 0}
        items: list[Any] = []
        while True:
            epoch, found = position["epoch"], 0
            for behind, example in self._examples(position, shuffle, seed):
                found += 1
                items.append(example)
                if len(items) == batch_size:
                    yield items, behind
                    items = []
            if not found and not position["rows"]:
                self.report.check_left(self._preparation.max_length)
                raise UserError(f"{self.rows.name} had rows before, and has none any more")
            position = {"epoch": epoch + 1, "rows": 0, "made": 0}

    def _examples(self, start: Position, shuffle: bool, seed: int) -> Iterator[tuple[Position, Any]]:
        """The examples of an epoch from a position on, each with the position behind it."""
        epoch, number, taken = start["epoch"], start["rows"], start["made"]
        draws = islice(self._draws(epoch, shuffle, seed), number, None)
        while chunk := list(islice(draws, TOGETHER)):
            of_row = {row: number + at for at, (row, _, _) in enumerate(chunk)}
            made, last, count = self._made(chunk), -1, 0
            self.report.add(self._preparation.report)
            self.check(extremes_of(made))
            for example in made:
                count = count + 1 if of_row[example.row] == last else 1
                last = of_row[example.row]
                if last > start["rows"] or count > taken:
                    yield {"epoch": epoch, "rows": last, "made": count}, example
            number += len(chunk)

    def _draws(self, epoch: int, shuffle: bool, seed: int) -> Iterator[Numbered]:
        if not shuffle:
            yield from self._numbered()
            return
        rng = random.Random(f"{seed}-{epoch}")
        buffer: list[Numbered] = []
        for one in self._numbered():
            if len(buffer) < self.buffer:
                buffer.append(one)
                continue
            at = rng.randrange(self.buffer)
            drawn, buffer[at] = buffer[at], one
            yield drawn
        rng.shuffle(buffer)
        yield from buffer

    def _numbered(self) -> Iterator[Numbered]:
        return ((index, line, row) for index, (line, row) in enumerate(self.rows.numbered()))

    def _drawn(self, chunk: Sequence[Numbered]) -> Rows:
        numbers, lines, rows = zip(*chunk, strict=True)
        return Rows(self.rows.name, rows, None if lines[0] is None else lines, numbers=numbers)

    def _made(self, chunk: Sequence[Numbered]) -> list[Any]:
        """What these rows become, with their numbers in the data set; the preparation's report is of them alone."""
        preparation, drawn = self._preparation, self._drawn(chunk)
        preparation.rows, preparation.report = drawn, Report(drawn)
        return [dataclasses.replace(made, row=chunk[made.row][0]) for made in preparation.made()]
