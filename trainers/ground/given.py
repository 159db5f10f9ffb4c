"""Objects of a program's own (a model, a data set, a reward) where a configuration has names.

A configuration is plain text and says `object:train_dataset`; whoever would open a file of that name looks here first.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import UserError

PREFIX = "object:"
_GIVEN: dict[str, Any] = {}
_ONE = threading.RLock()


@contextlib.contextmanager
def giving(objects: Mapping[str, Any]) -> Iterator[None]:
    """Inside, the objects are found under their names, which begin with PREFIX. Another thread that gives objects of
    the same names waits."""
    with _ONE:
        before = dict(_GIVEN)
        _GIVEN.update(objects)
        try:
            yield
        finally:
            _GIVEN.clear()
            _GIVEN.update(before)


def given(name: str) -> Any:
    """The object of this name; None where the name is of something else. Raises UserError where it is gone."""
    if not name.startswith(PREFIX):
        return None
    if name not in _GIVEN:
        raise UserError(
            f"{name} was an object of the program that trained with it, and is in no file; give another in its place"
        )
    return _GIVEN[name]
