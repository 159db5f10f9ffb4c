"""Where losses and their variants are entered by name, and the checks of their options."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from .types import Loss

LOSSES: dict[str, type[Loss]] = {}
"""Every registered loss by its method's name, as in `logratio train NAME`."""

L = TypeVar("L", bound=type[Loss])
F = TypeVar("F", bound=Callable[..., Any])


def register(name: str) -> Callable[[L], L]:
    """Class decorator: make a loss known to the command line, the oracle and the property tests."""

    def add(cls: L) -> L:
        if name in LOSSES:
            raise ValueError(f"a loss named {name!r} is registered already: {LOSSES[name]}")
        LOSSES[name] = cls
        return cls

    return add


def variant(table: dict[str, F], name: str | None = None) -> Callable[[F], F]:
    """Function decorator: enter a formula into a loss's table of `loss_type`s, under its own name by default."""

    def add(formula: F) -> F:
        enter(table, name or formula.__name__, formula)
        return formula

    return add


def enter(table: dict[str, Any], name: str, formula: Any) -> None:
    """Put a variant into its table. ValueError where the name is taken."""
    if name in table:
        raise ValueError(f"a variant named {name!r} is registered already")
    table[name] = formula


def check_choice(name: str, value: str, table: Collection[str]) -> None:
    """Raise ValueError naming the field, its value and what it may be."""
    if value not in table:
        raise ValueError(f"{name}={value!r} is unknown, expected one of: {', '.join(table)}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value} must be positive and finite")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name}={value} must be in [{low:g}, {high:g}]")
