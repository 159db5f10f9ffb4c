"""Where losses are entered by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .types import Loss

LOSSES: dict[str, type[Loss]] = {}
"""Every registered loss by its method's name, as in `logratio train NAME`."""

L = TypeVar("L", bound=type[Loss])


def register(name: str) -> Callable[[L], L]:
    """Class decorator: make a loss known to the command line, the oracle and the property tests."""

    def add(cls: L) -> L:
        if name in LOSSES:
            raise ValueError(f"a loss named {name!r} is registered already: {LOSSES[name]}")
        LOSSES[name] = cls
        return cls

    return add
