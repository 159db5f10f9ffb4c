"""What a law is, and the book of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from logratio.losses.types import Loss

from .strategies import Batch, batches


@dataclass(frozen=True)
class Law:
    """check(loss, batch, **choices) raises AssertionError. applies(loss): whether the law speaks of such a loss.

    options: of `batches`. choices: name -> strategy, or function of the batch that gives one. made: (loss, batch,
    **choices) -> the batch that `check` is about, where that is another than is drawn; for the message.
    """

    name: str
    statement: str
    check: Callable[..., None]
    applies: Callable[[Loss], bool]
    options: dict[str, Any]
    choices: dict[str, Any]
    made: Callable[..., Batch] | None = None

    def examples(self, kind: str, distinct: bool = False) -> st.SearchStrategy[dict[str, Any]]:
        """Keyword arguments of `check` but the loss; distinct: see `batches`."""

        @st.composite
        def example(draw: st.DrawFn) -> dict[str, Any]:
            batch = draw(batches(kind, distinct=distinct, **self.options))
            chosen = {k: draw(s if isinstance(s, st.SearchStrategy) else s(batch)) for k, s in self.choices.items()}
            return {"batch": batch, **chosen}

        return example()


LAWS: dict[str, Law] = {}
"""Every law by its name, in the order in which `check_loss` tries them."""


def named(check: Callable[..., None]) -> Callable[..., None]:
    """Function decorator: the law's AssertionErrors begin with its name."""
    name = check.__name__

    @functools.wraps(check)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            check(*args, **kwargs)
        except AssertionError as error:
            text = str(error)
            raise AssertionError(text if text.startswith(f"{name}: ") else f"{name}: {text}") from None

    return wrapped


def law(
    *,
    applies: Callable[[Loss], bool] = lambda loss: True,
    options: dict[str, Any] | None = None,
    made: Callable[..., Batch] | None = None,
    **choices: Any,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Function decorator: enter a law into `LAWS` under its own name; see `Law`."""

    def add(check: Callable[..., None]) -> Callable[..., None]:
        name, statement = check.__name__, " ".join((check.__doc__ or "").split("\n\n")[0].split())
        LAWS[name] = Law(name, statement, named(check), applies, options or {}, choices, made)
        return LAWS[name].check

    return add


def expect(condition: Any, message: str) -> None:
    """`assert` that survives `python -O`."""
    if not condition:
        raise AssertionError(message)
