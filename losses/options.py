"""Options of losses: the values that they may have, and which variants read them.

A range stands in the option's annotation (`beta: Positive = 0.1`); what only some variants read stands where a variant
is entered (`@dpo_type(reads=("label_smoothing",))`). The checks, the command line's help and the tests of the README
follow from these two. A loss of the user's own needs neither.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

V = TypeVar("V")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """Where a finite number may lie; above, below: the ends themselves are out."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def admits(self, value: Any) -> bool:
        """Whether it lies there."""
        low = self.low < value if self.above else self.low <= value
        return bool(low and (value < self.high if self.below else value <= self.high))

    def __str__(self) -> str:
        if self.high < math.inf:
            before, behind = "(" if self.above else "[", ")" if self.below else "]"
            return f"must be in {before}{self.low:.10g}, {self.high:.10g}{behind}"
        return "must be positive" if self.above else "must not be negative"


Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(0, above=True)]


def out_of_range(options: Any) -> Iterator[tuple[str, Any, str]]:
    """(name, value, what it must be) of every number in a dataclass that is outside its range, or not finite.

    A default that is not finite itself means something, and may be given.
    """
    ranges = ranges_of(type(options))  # type: ignore[arg-type]  # a class is hashable
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, Real):
                continue
            if not isinstance(number, Integral) and not math.isfinite(number) and number != field.default:
                yield field.name, value, "must be finite"
            elif field.name in ranges and not ranges[field.name].admits(number):
                yield field.name, value, str(ranges[field.name])


@cache
def ranges_of(options: type) -> dict[str, Range]:
    """option -> its range, for those whose annotation has one."""
    try:
        hints = get_type_hints(options, include_extras=True)
    except NameError:  # a user's class, with names that only its type checker imports
        return {}
    return {name: found for name, hint in hints.items() for found in _ranges(hint)}


def _ranges(hint: Any) -> Iterator[Range]:
    for part in get_args(hint):
        if isinstance(part, Range):
            yield part
        else:
            yield from _ranges(part)


class Variants(dict[str, V]):
    """What an option may be, by name, and which of these read the other options.

    An option that no variant names as read or ignored is read by all of them.
    """

    def __init__(self) -> None:
        self.reads: dict[str, Collection[str]] = {}
        self.ignores: dict[str, Collection[str]] = {}

    def enter(self, name: str, entry: V, *, reads: Collection[str] = (), ignores: Collection[str] = ()) -> None:
        """Add a variant. ValueError where the name is taken.

        reads: options that only some variants read, this one among them. ignores: options that most variants read, but
        not this one.
        """
        if name in self:
            raise ValueError(f"a variant named {name!r} is registered already")
        self[name], self.reads[name], self.ignores[name] = entry, reads, ignores

    def readers(self, option: str) -> list[str]:
        """The variants that read it."""
        some = [name for name in self if option in self.reads.get(name, ())]
        return some or [name for name in self if option not in self.ignores.get(name, ())]

    def said(self, option: str) -> str:
        """The same in words, "" where all of them do: "a, b" or "all but a, b", whichever is shorter."""
        readers = self.readers(option)
        others = [name for name in self if name not in readers]
        if not others:
            return ""
        return ", ".join(readers) if len(readers) <= len(others) else f"all but {', '.join(others)}"


def variant(
    table: Variants[F], name: str | None = None, *, reads: Collection[str] = (), ignores: Collection[str] = ()
) -> Callable[[F], F]:
    """Function decorator: enter a formula into a table of variants, under its own name by default."""

    def add(formula: F) -> F:
        table.enter(name or formula.__name__, formula, reads=reads, ignores=ignores)
        return formula

    return add


def check_choice(name: str, value: str, table: Collection[str]) -> None:
    """Raise ValueError naming the field, its value, what it may be, and what was probably meant."""
    if value not in table:
        near = difflib.get_close_matches(str(value), list(table), cutoff=0.75)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name}={value!r} is unknown, expected one of: {', '.join(table)}{meant}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be positive and finite")


def check_options(loss: Any) -> None:
    """Raise ValueError for an unknown variant, a number out of its range, or an option that is set but not read."""
    for option, table in loss.option_tables.items():
        for name in _chosen(loss, option):
            check_choice(option, name, table)
    for name, value, must in out_of_range(loss):
        raise ValueError(f"{name}={value} {must}")
    for field in dataclasses.fields(loss):
        value = getattr(loss, field.name)
        if (loss.option_tables or loss.option_switches) and value != field.default:
            _check_read(loss, field.name, value)


def _check_read(loss: Any, name: str, value: Any) -> None:
    for option, table in loss.option_tables.items():
        chosen = _chosen(loss, option)
        if not set(chosen) & set(table.readers(name)):
            raise ValueError(
                f"{name}={value} is not read by {option} {', '.join(chosen)}; leave it out: it is an option of "
                f"{table.said(name)}"
            )
    switch = loss.option_switches.get(name)
    if switch and not getattr(loss, switch):
        raise ValueError(f"{name}={value} is read only where {switch} is not 0; leave it out")


def _chosen(loss: Any, option: str) -> tuple[str, ...]:
    """None, which leaves the choice to another option, may be any of them."""
    value = getattr(loss, option)
    if value is None:
        return tuple(loss.option_tables[option])
    return value if isinstance(value, tuple) else (value,)


def readers_said(loss: type, name: str) -> str:
    """For the help of an option: which variants read it, "" where all do, always."""
    parts = [f"{option}: {said}" for option, table in loss.option_tables.items() if (said := table.said(name))]  # type: ignore[attr-defined]
    if name in loss.option_switches:  # type: ignore[attr-defined]
        parts.append(f"{loss.option_switches[name]}: not 0")  # type: ignore[attr-defined]
    return "; ".join(parts)
