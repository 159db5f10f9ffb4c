"""The words of a command line, before a parser has seen them: which options are none, and which values do not fit.

tyro says as much in a box of what it tried; here it is a line for each.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError

NUMBERS = {float: "a number", int: "a whole number"}
NONE = "None"
UNIONS = (Union, types.UnionType)


def given(argv: Iterable[str]) -> list[tuple[str, list[str]]]:
    """(option, the values behind it), in the order in which they stand; one may stand twice."""
    found: list[tuple[str, list[str]]] = []
    values: list[str] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = [value] if equals else []
            found.append((name.replace("-", "_"), values))
        else:
            values.append(word)
    return found


def hints_of(parts: Iterable[Any]) -> dict[str, Any]:
    """Option -> its type, of these dataclasses."""
    hints = ((get_type_hints(part), dataclasses.fields(part)) for part in parts)
    return {f.name: of_part[f.name] for of_part, fields in hints for f in fields}


def refuse_misfits(argv: Sequence[str], hints: Mapping[str, Any]) -> None:
    """Raise UserError for options whose values their types cannot hold, or that have none; not where help is asked."""
    known = {**hints, **{f"no_{name}": hint for name, hint in hints.items() if hint is bool}}
    found = (misfit(name, values, known[name]) for name, values in given(argv) if name in known)
    if (wrong := [line for line in found if line]) and not {"-h", "--help"} & set(argv):
        raise UserError("; ".join(wrong))


def misfit(name: str, values: Sequence[str], hint: Any) -> str | None:
    """What is wrong with these values of an option, in a line."""
    if hint is bool:
        flag = name.removeprefix("no_")
        return f"--{flag} takes no value: --{flag} or --no_{flag}, not --{name} {values[0]}" if values else None
    if not as_many(values, hint):
        several = next((len(get_args(part)) for part in (hint, *get_args(hint)) if get_origin(part) is tuple), 0)
        many = f"{several} values" if several else "one value"
        return f"--{name} takes {many}, not {' '.join(values)}" if values else f"--{name} needs a value"
    kinds = list(leaves(hint))
    if not all(kind in NUMBERS or isinstance(kind, str) for kind in kinds):
        return None  # a text, a path, a table: what it holds is judged where it is read
    wrong = next((value for value in values if not any(fits(value, kind) for kind in kinds)), None)
    if wrong is None:
        return None
    choices = [kind for kind in kinds if isinstance(kind, str) and kind != NONE]
    taken = [NUMBERS[kind] for kind in NUMBERS if kind in kinds][:1]  # a number may be whole
    taken += [f"one of {', '.join(choices)}"] if len(choices) > 1 else choices
    near = difflib.get_close_matches(wrong, choices, 1)
    return f"--{name} takes {' or '.join(taken)}, not {wrong!r}" + (f"; did you mean {near[0]}?" if near else "")


def leaves(hint: Any) -> Iterator[Any]:
    """The types that one value may have, and texts for choices; and for None its name."""
    if hint is bool:  # beside others: alone it is a flag
        yield from ("True", "False")
    elif get_origin(hint) is Literal:
        yield from map(str, get_args(hint))
    elif get_origin(hint) in (*UNIONS, tuple, list, Sequence):
        for part in get_args(hint):
            yield from leaves(part)
    elif hint is type(None):
        yield NONE
    elif hint is not ...:
        yield hint


def as_many(values: Sequence[str], hint: Any) -> bool:
    """Whether a type may have so many values."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in UNIONS:
        return any(as_many(values, part) for part in parts)
    if hint is type(None):
        return list(values) == [NONE]
    if origin is tuple and ... not in parts:
        return len(values) == len(parts)
    return len(values) == 1 or not (origin is Literal or hint in (bool, str, *NUMBERS))


def fits(value: str, kind: Any) -> bool:
    if isinstance(kind, str):
        return value == kind
    try:
        kind(value)
    except ValueError:
        return False
    return True
