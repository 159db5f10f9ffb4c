"""Rows out of one file: JSON lines or a JSON list, perhaps gzipped, or Parquet.

JSON lines and Parquet are never in memory as a whole: a file is looked through once, for its digest and the places of
its rows, and read anew each time that the rows are iterated over.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from ..errors import RowError, UserError, first_line, shown

FILE_TYPES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
APART = 1000  # rows from one to the next whose place in the file is known
CHUNK = 1 << 20  # bytes


def file_type(name: str) -> str | None:
    """Of `FILE_TYPES` the one that the name ends in."""
    return next((suffix for suffix in FILE_TYPES if name.lower().endswith(suffix)), None)


def open_file(path: Path) -> ListRows | LineRows | ParquetRows:
    """The file's rows; what is no row, of a list or a line, is its RowError, in its place among them."""
    known = file_type(path.name)
    if known is None:
        raise UserError(
            f"{path} is no data file of a known type: expected {', '.join(FILE_TYPES)} (or a folder, from which "
            "Hugging Face's datasets reads CSV, text and others, and what save_to_disk wrote)"
        )
    if known == ".parquet":
        return ParquetRows(path)
    lines = LineRows(path)
    return ListRows(path) if lines.holds_list else lines


def parse_json(text: str) -> Any:
    """As `json.loads`, but an object that has a key twice is refused; raises ValueError, whatever is wrong."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        if str(error).startswith("Exceeds the limit"):
            raise ValueError("has a number of too many digits") from None
        raise


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return found


def _problem(error: ValueError) -> str:
    """What is wrong with a piece of JSON: the sentence that its place begins."""
    if isinstance(error, json.JSONDecodeError):
        return f", column {error.colno} is not valid JSON: {error.msg}"
    return f" {error}"


def _chunks(path: Path, *, lines: bool = False, start: int = 0) -> Iterator[bytes]:
    """The file's bytes, unpacked, from `start` on: up to each line feed, or in pieces of one size."""
    try:
        with path.open("rb") as file:
            packed = path.name.lower().endswith(".gz")
            source = cast(BinaryIO, gzip.GzipFile(fileobj=file) if packed else file)
            source.seek(start)
            yield from source if lines else iter(lambda: source.read(CHUNK), b"")
    except (OSError, EOFError, zlib.error) as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise UserError(f"{path} cannot be read: {reason}") from None


class _OneFile:
    """A file that is read more than once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._first = self._state()

    def __iter__(self) -> Iterator[Any]:
        return self.starting(0)

    def starting(self, row: int) -> Iterator[Any]:
        """The rows from this one on."""
        raise NotImplementedError

    def _state(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns

    def check_unchanged(self) -> None:
        """Raise UserError where it is another since it was first read."""
        if self._state() != self._first:
            raise UserError(f"{self.path} was changed while it was read: start again when it is complete")


class Place(NamedTuple):
    """Where in a file to go on: behind so many lines and (unpacked) bytes."""

    lines: int
    read: int


START = Place(0, 0)


def _decoded(path: Path, data: bytes, before: int = 0) -> str:
    """As text with line feeds alone. before: how many bytes of the file come before these."""
    if not before and data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16 text: save it as UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {before + error.start}): save it as UTF-8") from None
    text = text if before else text.removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n")


class ListRows(list[Any]):
    """The rows of a JSON list. digest: SHA-256 of the text."""

    def __init__(self, path: Path) -> None:
        text = _decoded(path, b"".join(_chunks(path)))
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        try:
            super().__init__(parse_json(text))
        except ValueError as error:
            place = f"{path}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
            raise UserError(place + _problem(error)) from None
        for index, row in enumerate(self):
            if not isinstance(row, dict):
                place = f"{path}, row {index} (counted from 0)"
                self[index] = RowError(place, f" must be one object, got {shown(row)}", index)


class LineRows(_OneFile):
    """JSON lines. lines: each row's line number, from 1. digest: SHA-256 of the (unpacked) file.

    holds_list: it is no JSON lines, but one list. Raises UserError where the file cannot be read or is no UTF-8.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        first = next(self._lines(), None)
        self.holds_list = first is not None and first[1].lstrip().startswith("[")

    @cached_property
    def _known(self) -> tuple[str, Sequence[int], list[tuple[int, Place]]]:
        """The file looked through once: its digest, the rows' line numbers, and the places of every so many-th row."""
        digest = hashlib.sha256()
        numbers: list[int] = []
        places: list[tuple[int, Place]] = []
        last = START
        for number, _, place in self._lines(digest=digest):
            if not places or (len(numbers) >= places[-1][0] + APART and place > last):
                places.append((len(numbers), place))
            last = place
            numbers.append(number)
        gaps = bool(numbers) and numbers[-1] != len(numbers)
        return digest.hexdigest(), numbers if gaps else range(1, len(numbers) + 1), places

    @property
    def digest(self) -> str:
        return self._known[0]

    @property
    def lines(self) -> Sequence[int]:
        return self._known[1]

    def __len__(self) -> int:
        return len(self.lines)

    def starting(self, row: int) -> Iterator[Any]:
        return (found for _, found in self.numbered(row))

    def numbered(self, row: int = 0) -> Iterator[tuple[int, Any]]:
        """The same with the numbers of their lines; from the first one on, the file is not looked through before."""
        places = self._known[2] if row else []
        first, place = next((known for known in reversed(places) if known[0] <= row), (0, START))
        for index, (number, line, _) in enumerate(self._lines(place), first):
            if index >= row:
                yield number, self._row(index, number, line)

    def _row(self, index: int, number: int, line: str) -> Any:
        try:
            row = parse_json(line)
            problem = None if isinstance(row, dict) else f" must be one object, {{...}}, got {shown(row)}"
        except ValueError as error:
            problem = _problem(error)
            if index == 0 and self._is_one_object():
                raise UserError(
                    f"{self.path} holds a single object over several lines: write the rows as a list, [{{...}}, ...], "
                    "or each on a line of its own"
                ) from None
        return row if problem is None else RowError(f"{self.path}, line {number}", problem, index)

    def _lines(self, place: Place = START, digest: Any = None) -> Iterator[tuple[int, str, Place]]:
        """(number, text, place to begin at for it) of the lines from `place` on that are not blank.

        digest: takes up what is read.
        """
        number, read = place
        for data in _chunks(self.path, lines=True, start=read):
            place = Place(number, read)
            read += len(data)
            if digest is not None:
                digest.update(data)
            # Not str.splitlines(), which would also cut at line separators that JSON allows inside strings. Files that
            # were put together out of several have a byte order mark in front of the first line of each.
            for line in _decoded(self.path, data, place.read).removesuffix("\n").split("\n"):
                number += 1
                line = line.removeprefix("\ufeff")
                if line.strip():
                    yield number, line, place

    def _is_one_object(self) -> bool:
        try:
            text = _decoded(self.path, b"".join(_chunks(self.path)))
            return isinstance(parse_json(text), dict)
        except ValueError:
            return False


class ParquetRows(_OneFile):
    """Rows of a Parquet file, read by record batches. digest: SHA-256 of the file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._said():
            found = self._open()
            self._count: int = found.metadata.num_rows
            names = found.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:  # of which a row would have the last
            raise UserError(f"{path} has the column {twice[0]!r} twice: remove or rename one")

    @cached_property
    def digest(self) -> str:
        found = hashlib.sha256()
        for chunk in _chunks(self.path):
            found.update(chunk)
        return found.hexdigest()

    def __len__(self) -> int:
        return self._count

    def starting(self, row: int) -> Iterator[Any]:
        passed = 0
        with self._said():
            for batch in self._open().iter_batches(APART):
                passed += batch.num_rows
                if passed > row:
                    yield from batch.slice(max(0, row - passed + batch.num_rows)).to_pylist()

    def _open(self) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self.path)

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        # A damaged file is reported as an ArrowException, an OSError, a ValueError, and more, some of them while its
        # values are turned into Python's.
        try:
            yield
        except Exception as error:
            raise UserError(f"{self.path} cannot be read as parquet: {first_line(error)}") from None
