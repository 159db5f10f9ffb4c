"""Measured lines, and the tables and plots made of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from logratio.trainers.errors import UserError


@contextmanager
def drawing() -> Iterator[None]:
    """Around the import of what draws: matplotlib is an extra, and without it every other command works."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"plots need matplotlib ({error}): pip install -e '.[bench]' in the checkout") from error
