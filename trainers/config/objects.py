"""Options that are objects: JSON on a command line, mappings in YAML."""

from __future__ import annotations

import json
from typing import Any

from ..errors import UserError


def keep_as_text(config: Any, name: str) -> None:
    """Let the frozen `config` hold a mapping as JSON, as it came from a command line; UserError for other JSON."""
    if isinstance(value := getattr(config, name), dict):
        object.__setattr__(config, name, json.dumps(value, default=str))  # a date is as it was written
    json_object(config, name)


def json_object(config: Any, name: str) -> dict[str, Any]:
    """What the option says; empty where it is not given. UserError where it is no JSON object."""
    text = getattr(config, name)
    try:
        said = json.loads(text or "{}", parse_constant=int)  # which raises at NaN and Infinity, as JSON has none
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise UserError(f"--{name} {text} is no JSON object")
    return said
