"""What a class says of the names that it takes: scripts ask its signature which of them this version knows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any


def takes(cls: type, first: tuple[str, ...], names: Iterable[str], *, rest: str = "") -> None:
    """Give a class an __init__ of its own, which is the one that it has, with a signature that lists what it takes.

    first: without a name. names: by name alone. rest: what all others are called, where there are any.
    """
    inherited: Any = cls.__init__  # type: ignore[misc]

    @functools.wraps(inherited)
    def __init__(self: Any, *positional: Any, **named: Any) -> None:
        inherited(self, *positional, **named)

    one = inspect.Parameter
    parameters = [one("self", one.POSITIONAL_OR_KEYWORD)]
    parameters += [one(name, one.POSITIONAL_OR_KEYWORD, default=None) for name in first]
    parameters += [one(name, one.KEYWORD_ONLY, default=...) for name in sorted(names)]
    parameters += [one(rest, one.VAR_KEYWORD)] if rest else []
    __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[misc]
