"""Files that a command leaves."""

from __future__ import annotations

import contextlib
from pathlib import Path

from logratio.trainers.errors import UserError


def write(path: Path, data: bytes, option: str = "--output") -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path} could not be written: {error.strerror}; choose another {option}") from error
