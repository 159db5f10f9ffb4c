"""Rows that a program gives as a list, or as whatever has a length and is taken from by number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np

from ..errors import RowError, UserError, shown
from .table.values import to_json


class OwnRows(Sequence[Any]):
    """Each a dict of Python's own values, as a file would give them; in place of one that is no mapping its RowError.

    name: by which messages call them.
    """

    def __init__(self, name: str, rows: Any) -> None:
        self.name, self.rows = name, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.rows[index]
        if isinstance(row, Mapping):
            return {column: plain(value) for column, value in row.items()}
        return RowError(f"{self.name}, row {index} (counted from 0)", f" must be one object, got {shown(row)}", index)

    @cached_property
    def digest(self) -> str:
        return digest_of(self.name, self)


def digest_of(name: str, rows: Iterable[Any]) -> str:
    """SHA-256 of what the rows say. UserError for a value that no file can hold."""
    found = hashlib.sha256()
    for index, row in enumerate(rows):
        try:
            found.update(str(row).encode() if isinstance(row, RowError) else to_json(plain(row)).encode())
        except (TypeError, RecursionError) as error:
            raise UserError(
                f"{name}, row {index} (counted from 0) has a value that cannot be kept "
                f"({error if isinstance(error, TypeError) else 'nested too deeply'}): leave that column out"
            ) from error
    return found.hexdigest()


def plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's, in lists and dicts too."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if type(value) is list:
        return [plain(item) for item in value]
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    return value
