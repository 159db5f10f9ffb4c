"""The one exception that is meant for the user's eyes."""

from __future__ import annotations


class UserError(Exception):
    """Input that cannot be used: one sentence with the place and the remedy.

    The command line prints it without a traceback and exits with status 1.
    """
