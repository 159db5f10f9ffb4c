"""The exceptions that are meant for the user's eyes, and what one says of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class UserError(Exception):
    """Input that cannot be used: one sentence with the place and the remedy.

    The command line prints it without a traceback and exits with status 1.
    """


class Stopped(Exception):
    """A run that a signal ended in good order, and how to go on; the command line exits with `signals.STATUS`."""


class RowError(UserError):
    """One row that cannot be used, which a run may go on without (`--on_bad_row skip`).

    place: where it stands, with which the sentence begins. rest: of the sentence, with the space, colon or comma that
    joins it to the place; `reason` is the same without. row: its index in the data set.
    """

    def __init__(self, place: str, rest: str, row: int) -> None:
        super().__init__(place + rest)
        self.place, self.reason, self.row = place, rest.lstrip(",: "), row

    @classmethod
    def of(cls, error: UserError, place: str, row: int) -> RowError | None:
        """The error as one of this row, whose place its sentence begins with; None where it is about something else."""
        if isinstance(error, cls):
            return error
        text = str(error)
        rest = text[len(place) :]
        return cls(place, rest, row) if text.startswith(place) and not rest[:1].isdigit() else None


def counted(number: int, name: str) -> str:
    """ "1 step", "2,000 steps": the number with its noun, whose last word takes an s unless it is one."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def listed(numbers: Sequence[int]) -> str:
    """ "1, 2, 5", of many the first 16 and how many more there are."""
    shown = ", ".join(map(str, numbers[:16]))
    return shown if len(numbers) <= 16 else f"{shown} and {len(numbers) - 16:,} more"


def first_line(error: BaseException) -> str:
    """Of its message; its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def printable(text: str) -> str:
    """The text with what would steer a terminal written out: a reward's or a server's words may be in it."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """The value's type and its beginning, for messages; whatever the value, this does not fail."""
    try:
        text = repr(value)
    except Exception as error:  # an integer of 5,000 digits, a list in a list in a list, ...
        text = f"that cannot be shown ({first_line(error)})"
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
