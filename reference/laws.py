"""Laws that every loss keeps, whoever wrote it: `check_loss(MyLoss())` holds one to all of them.

Each law is a plain function of a loss and a batch of `strategies` (and of what else its equation speaks of), in
`generic_laws.py` or `gradient_laws.py`: it raises AssertionError with its name and the numbers that differ, and its
docstring states it. `check_loss` has Hypothesis look for the smallest batch that breaks one, and works in a script as
in a test:

    from logratio.reference.laws import check_loss
    check_loss(MyLoss(beta=0.1))

Laws of particular families of losses are in `family_laws.py`. A whole trainer has laws too, `check_trainer`, as have
an advantage, `check_advantage`, and an LM head, `check_kernel`: see `trainer_laws` and `function_laws`.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Collection
from typing import Any, Literal

import hypothesis
import hypothesis.configuration
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import strategies as st

from logratio.losses.types import Loss

from . import generic_laws, gradient_laws  # they fill the book
from ._law_book import LAWS, Law
from ._law_runs import copy, show
from ._verdicts import LawViolation, Report
from .function_laws import check_advantage, check_kernel
from .strategies import Batch, batches
from .trainer_laws import Trained, adamw, check_trainer, sgd

__all__ = [
    "LAWS",
    "Law",
    "LawViolation",
    "Report",
    "Trained",
    "adamw",
    "check_advantage",
    "check_kernel",
    "check_loss",
    "check_trainer",
    "for_every_batch",
    "generic_laws",
    "gradient_laws",
    "laws_of",
    "sgd",
]


def laws_of(loss: Loss) -> list[str]:
    """The names of the laws that speak of such a loss, in the order in which `check_loss` tries them."""
    return [name for name, one in LAWS.items() if one.applies(loss)]


def check_loss(
    loss: Loss,
    *,
    max_examples: int = 50,
    laws: Collection[str] | None = None,
    skip: Collection[str] = (),
    stops_gradients: bool | Literal["collected"] = False,
    seed: int = 0,
) -> None:
    """Hold a loss to the laws of its kind; raise `LawViolation` for the first that it breaks.

    laws: only these. skip: all but these, for a loss that means to break them. stops_gradients: its gradient is not
    that of its value, on purpose; "collected": it is, with what the loss collects of the step held still.
    The same `seed` draws the same batches. Raises ValueError for a law that does not apply, TypeError for what is no
    loss.
    """
    if not isinstance(loss, Loss) or not hasattr(loss, "kind"):
        of = f"the class {loss.__name__}" if isinstance(loss, type) else f"a {type(loss).__name__}"
        raise TypeError(f"check_loss holds an object of a class of logratio.losses.Loss with a `kind`, not {of}")
    words = repr(loss)  # before a call may change it
    applicable = laws_of(loss)
    unknown = {*(laws or ()), *skip} - {*LAWS}
    if unknown or not {*(laws or ())} <= {*applicable}:
        raise ValueError(f"{', '.join(sorted(unknown)) or laws}: {type(loss).__name__} has the laws {applicable}")
    for name in applicable:
        if name in (applicable if laws is None else laws) and name not in skip:
            if name != "gradient" or stops_gradients is not True:
                choices = {"moves": False} if name == "gradient" and stops_gradients == "collected" else {}
                _hold(LAWS[name], loss, words, max_examples, seed, choices)


def _hold(one: Law, loss: Loss, words: str, max_examples: int, seed: int, choices: dict[str, Any]) -> None:
    """Try the law on examples; where it breaks, look for the smallest and raise LawViolation."""
    ranks = loss.window_pass == "own"  # what compares examples has no one gradient where they tie
    found: dict[str, Any] = {}

    def attempt(drawn: dict[str, Any]) -> None:
        found.update(drawn)
        one.check(loss, **drawn | {"batch": copy(drawn["batch"])}, **choices)

    try:
        for drawn in _pool(one.name, loss.kind, ranks, max_examples, seed):
            attempt(drawn)
        return
    except Exception as error:
        cause = error
    first = dict(found)
    try:
        _given(one.examples(loss.kind, ranks), attempt, max_examples, seed)
        found = first  # Hypothesis could not make it fail again
    except ExceptionGroup as error:
        cause = error.exceptions[0]
    except Exception as error:
        cause = error
    detail = str(cause).removeprefix(f"{one.name}: ")
    if not isinstance(cause, AssertionError):
        detail = f"{type(cause).__name__}: {detail}"
    with_ = ", ".join(f"{k}={v}" for k, v in found.items() if k != "batch")
    batch = one.made(loss, **found) if one.made else found["batch"]
    lines = [
        one.statement,
        f"  {detail}",
        f"  {words}",
        *([f"  {with_}"] if with_ else []),
        show(loss, batch),
    ]
    raise LawViolation(one.name, "\n".join(lines)) from (None if isinstance(cause, AssertionError) else cause)


def for_every_batch(
    kind: str,
    law: Callable[[Batch], None],
    *,
    max_examples: int = 20,
    seed: int = 0,
    shrink: bool = True,
    **options: Any,
) -> None:
    """Call `law` on batches of `strategies`; where it raises, raise what the smallest such batch gives.

    shrink: False for what the first gives. options: of `batches`. For the laws of `family_laws.py`.
    """
    for batch in _batches(kind, max_examples, seed, **options):
        try:
            law(copy(batch))
        except AssertionError:
            if shrink:
                _given(batches(kind, **options), law, max_examples, seed)
            raise


@functools.lru_cache(64)
def _batches(kind: str, max_examples: int, seed: int, **options: Any) -> list[Batch]:
    drawn: list[Batch] = []
    _given(batches(kind, **options), drawn.append, max_examples, seed)
    return drawn


@functools.lru_cache(256)
def _pool(name: str, kind: str, ranks: bool, max_examples: int, seed: int) -> list[dict[str, Any]]:
    """Examples of a law, drawn once for all losses of a kind."""
    drawn: list[dict[str, Any]] = []
    _given(LAWS[name].examples(kind, ranks), drawn.append, max_examples, seed)
    return drawn


def _given(strategy: st.SearchStrategy, test: Callable[[Any], None], max_examples: int, seed: int) -> None:
    """Hypothesis's search: silent, without a deadline, and leaving no folder behind."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        print_blob=False,
    )
    @hypothesis.given(strategy)
    def attempt(drawn: Any) -> None:
        test(drawn)

    home = getattr(hypothesis.configuration, "__hypothesis_home_directory", None)
    with tempfile.TemporaryDirectory() as folder:
        hypothesis.configuration.set_hypothesis_home_dir(folder)
        try:
            attempt()
        finally:
            hypothesis.configuration.set_hypothesis_home_dir(home)
