"""The words of a command line, before a parser has seen them: which options are none, and which values do not fit.

tyro says as much in a box of what it tried; here it is a line for each.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

NUMBERS = {float: "a number", int: "a whole number"}
NONE = "None"


def given(argv: Sequence[str]) -> dict[str, list[str]]:
    """Option -> the values behind it, of all places where it stands."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = found.setdefault(name.replace("-", "_"), [])
            values += [value] if equals else []
        else:
            values.append(word)
    return found


def hints_of(parts: Iterable[Any]) -> dict[str, Any]:
    """Option -> its type, of these dataclasses."""
    hints = ((get_type_hints(part), dataclasses.fields(part)) for part in parts)
    return {f.name: of_part[f.name] for of_part, fields in hints for f in fields}


def misfits(words: Mapping[str, Sequence[str]], hints: Mapping[str, Any]) -> list[str]:
    """A line for each option whose values its type cannot hold, or that has none."""
    lines = (misfit(name, values, hints[name]) for name, values in words.items() if name in hints)
    return [line for line in lines if line]


def misfit(name: str, values: Sequence[str], hint: Any) -> str | None:
    """What is wrong with these values of an option, in a line."""
    kinds = list(leaves(hint))
    if kinds == [bool]:
        return f"--{name} takes no value: --{name} or --no_{name}, not --{name} {values[0]}" if values else None
    if not values:
        return None if holds_many(hint) else f"--{name} needs a value"
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
    origin = get_origin(hint)
    if origin is Annotated:
        yield from leaves(get_args(hint)[0])
    elif origin is Literal:
        yield from map(str, get_args(hint))
    elif origin in (Union, types.UnionType, tuple, list, Sequence):
        for part in get_args(hint):
            yield from leaves(part)
    elif hint is type(None):
        yield NONE
    elif hint is not ...:
        yield hint


def holds_many(hint: Any) -> bool:
    """Whether no value at all is one."""
    if get_origin(hint) in (Union, types.UnionType, Annotated):
        return any(map(holds_many, get_args(hint)))
    return get_origin(hint) in (tuple, list, Sequence)


def fits(value: str, kind: Any) -> bool:
    if isinstance(kind, str):
        return value == kind
    try:
        kind(value)
    except ValueError:
        return False
    return True
