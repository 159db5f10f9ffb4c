"""Rows out of one file: JSON lines or a JSON list, perhaps gzipped, or Parquet."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from ..errors import RowError, UserError, first_line, shown

FILE_TYPES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


def file_type(name: str) -> str | None:
    """Of `FILE_TYPES` the one that the name ends in."""
    return next((suffix for suffix in FILE_TYPES if name.lower().endswith(suffix)), None)


def read_file(path: Path, *, keep_bad: bool = False) -> tuple[list[Any], list[int] | None]:
    """The file's rows, and in JSON lines the number of each one's line.

    keep_bad: a line that is no row becomes its RowError, in its place among the rows, instead of ending everything.
    """
    known = file_type(path.name)
    if known is None:
        raise UserError(
            f"{path} is no data file of a known type: expected {', '.join(FILE_TYPES)} (or a folder, from which "
            "Hugging Face's datasets reads CSV, text and others, and what save_to_disk wrote)"
        )
    try:
        data = path.read_bytes()
        if known.endswith(".gz"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise UserError(f"{path} cannot be read: {reason}") from None
    if known == ".parquet":
        return _parquet_rows(path, data), None
    text = _decoded(path, data)
    if text.lstrip().startswith("["):
        return _list_rows(path, text, keep_bad), None
    return _line_rows(path, text, keep_bad)


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


def _decoded(path: Path, data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16 text: save it as UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _problem(error: ValueError) -> str:
    """What is wrong with a piece of JSON: the sentence that its place begins."""
    if isinstance(error, json.JSONDecodeError):
        return f", column {error.colno} is not valid JSON: {error.msg}"
    return f" {error}"


def _list_rows(path: Path, text: str, keep_bad: bool) -> list[Any]:
    try:
        rows = parse_json(text)
    except ValueError as error:
        place = f"{path}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise UserError(place + _problem(error)) from None
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            bad = RowError(f"{path}, row {index} (counted from 0)", f" must be one object, got {shown(row)}", index)
            if not keep_bad:
                raise bad
            rows[index] = bad
    return rows


def _line_rows(path: Path, text: str, keep_bad: bool) -> tuple[list[Any], list[int]]:
    # Not str.splitlines(), which would also cut at line separators that JSON allows inside strings. Files that were
    # put together out of several have a byte order mark in front of the first line of each.
    lines = [(number, line.removeprefix("\ufeff")) for number, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    rows: list[Any] = []
    for index, (number, line) in enumerate(lines):
        try:
            row = parse_json(line)
            problem = None if isinstance(row, dict) else f" must be one object, {{...}}, got {shown(row)}"
        except ValueError as error:
            problem = _problem(error)
            if index == 0 and _is_one_object(text):
                raise UserError(
                    f"{path} holds a single object over several lines: write the rows as a list, [{{...}}, ...], or "
                    "each on a line of its own"
                ) from None
        if problem is not None:
            row = RowError(f"{path}, line {number}", problem, index)
            if not keep_bad:
                raise row
        rows.append(row)
    return rows, [number for number, _ in lines]


def _is_one_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


def _parquet_rows(path: Path, data: bytes) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    # A damaged file is reported as an ArrowException, an OSError, a ValueError, and more, some of them while its
    # values are turned into Python's.
    try:
        return pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except Exception as error:
        raise UserError(f"{path} cannot be read as parquet: {first_line(error)}") from None
