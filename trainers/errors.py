"""The one exception that is meant for the user's eyes, and what one says of another."""

from __future__ import annotations


class UserError(Exception):
    """Input that cannot be used: one sentence with the place and the remedy.

    The command line prints it without a traceback and exits with status 1.
    """


def first_line(error: Exception) -> str:
    """Of its message; its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
