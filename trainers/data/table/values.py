"""Values of Python as JSON and back, the same: what rewards are given beside a prompt is whatever a row had.

JSON's own values stand for themselves. Others stand in an object with one key that no data set has, with their name.
"""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from collections.abc import Callable
from typing import Any

TAG = "\0"
KINDS: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "bytes": (bytes, lambda value: value.decode("latin-1"), lambda text: text.encode("latin-1")),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "decimal": (decimal.Decimal, str, decimal.Decimal),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "timedelta": (
        datetime.timedelta,
        lambda value: str(value // datetime.timedelta(microseconds=1)),
        lambda text: datetime.timedelta(microseconds=int(text)),
    ),
    "uuid": (uuid.UUID, str, uuid.UUID),
}


def to_json(value: Any) -> str:
    """Raises TypeError for a value of another kind, RecursionError for one nested too deeply."""
    return json.dumps(_plain(value))


def from_json(text: str | bytes) -> Any:
    """What `to_json` was given."""
    return json.loads(text, object_hook=_value)


def _plain(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (str, int, float, bool):
        return value
    if kind is list:
        return [_plain(item) for item in value]
    if kind is dict and TAG not in value and all(type(key) is str for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if kind is dict:
        return {TAG: ["dict", [[_plain(key), _plain(item)] for key, item in value.items()]]}
    if kind is tuple:
        return {TAG: ["tuple", [_plain(item) for item in value]]}
    for name, (known, write, _) in KINDS.items():
        if kind is known:
            return {TAG: [name, write(value)]}
    raise TypeError(kind.__name__)


def _value(found: dict[str, Any]) -> Any:
    if TAG not in found:
        return found
    name, inside = found[TAG]
    if name == "dict":
        return {key: item for key, item in inside}
    return tuple(inside) if name == "tuple" else KINDS[name][2](inside)
