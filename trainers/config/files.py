"""Options out of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError


def read_entries(path: Path, source: str | None = None) -> dict[Any, Any]:
    """What a file of options holds: YAML, or JSON. source: what a message calls it."""
    import yaml

    source = source or f"--config {path}"
    try:
        entries = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise UserError(f"{source}: there is no such file") from None
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{source} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(entries, dict):
        raise UserError(f"{source} must map option names to values, got a {type(entries).__name__}")
    return entries
