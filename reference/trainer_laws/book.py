"""What a trainer's law is, the book of them, and how one asks a trainer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .._verdicts import NotAsked
from .trained import Trained, make_rows, show_row

ALWAYS = ("batch_size", "steps")
OPTIONAL = ("micro_batch_size", "processes", "seed", "learning_rate", "stop_after")
"""What `fn` may take beside its rows, `batch_size` and `steps`."""


@dataclass(frozen=True)
class Case:
    """A small data set, and how it is trained on: `count` rows of a design of `make_rows`, batches of `batch_size`
    rows (None: all), cut into micro-batches of `block` rows."""

    design: str
    count: int
    size: int
    draw: int
    batch_size: int | None = None
    steps: int = 1
    block: int = 1

    def cut_into(self, block: int) -> Case:
        """As many micro-batches, of so many rows."""
        batch = None if self.batch_size is None else self.batch_size * block
        return dataclasses.replace(self, count=self.count * block, batch_size=batch, block=block)

    def smaller(self, fewest: int) -> Iterator[Case]:
        """Cases of the same design with less in them, the smallest first; at least `fewest` micro-batches."""
        counts = range(fewest * self.block, self.count, self.block) if self.batch_size is None else ()
        changes: list[dict[str, Any]] = [{"count": n} for n in counts]
        changes += [{"size": n} for n in range(1, self.size)] + ([{"draw": 0}] if self.draw else [])
        yield from (dataclasses.replace(self, **change) for change in changes)


@dataclass
class Asking:
    """A trainer and what is known of it; each different run is made once."""

    fn: Callable[..., Trained]
    kind: str
    loss_at_start: float | None
    rtol: float | None

    def __post_init__(self) -> None:
        self.done: dict[Any, Trained] = {}
        self.runs = 0
        parameters = inspect.signature(self.fn).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        missing = [name for name in ALWAYS if name not in parameters and not anything]
        if missing:
            raise TypeError(f"a trainer is fn(rows, *, batch_size, steps, ...): this one takes no {', '.join(missing)}")
        self.takes = [name for name in OPTIONAL if name in parameters or anything]
        rate = parameters.get("learning_rate")
        self.learning_rate = rate.default if rate is not None and isinstance(rate.default, float) else None

    def needs(self, *names: str) -> None:
        """Raise NotAsked unless fn takes these arguments."""
        absent = [name for name in names if name not in self.takes]
        if absent:
            raise NotAsked(f"fn takes no {' and no '.join(absent)}")

    def rows(self, case: Case) -> list[dict[str, Any]]:
        return make_rows(self.kind, case.design, case.count, case.size, case.draw, case.block)

    def run(self, case: Case, *, again: bool = False, order: tuple[int, ...] | None = None, **changed: Any) -> Trained:
        """Train on the case: in one micro-batch of one process with seed 0, unless it is `changed`, as far as fn takes
        such arguments. again: even if it was done before. order: of the rows."""
        batch = case.batch_size or case.count
        settings = {"micro_batch_size": batch, "processes": 1, "seed": 0} | changed
        settings = {"steps": case.steps, **{k: v for k, v in settings.items() if k in (*self.takes, "steps")}}
        key = (case.design, case.count, case.size, case.draw, batch, order, *sorted(settings.items()))
        if key not in self.done or again:
            rows = self.rows(case)
            rows = rows if order is None else [rows[i] for i in order]
            self.runs += 1
            trained = self.fn(rows, batch_size=batch, **settings)
            _check(trained, settings["steps"])
            self.done[key] = trained
        return self.done[key]

    def show(self, case: Case) -> str:
        """The case, a line a row."""
        rows = [f"    {show_row(row)}" for row in self.rows(case)]
        batch = case.batch_size or case.count
        plural = "" if case.count == 1 else "s"
        return "\n".join([f"  {case.count} row{plural}, batch_size={batch}, steps={case.steps}:", *rows])


def _check(trained: Any, steps: int) -> None:
    """TypeError or ValueError for what is not a `Trained` of so many steps."""
    if not isinstance(trained, Trained):
        raise TypeError(f"a trainer returns a Trained, this one returned {type(trained).__name__}")
    if len(trained.losses) != steps:
        raise ValueError(f"{steps} steps were asked for, and {len(trained.losses)} losses came")
    if trained.start.keys() != trained.end.keys():
        raise ValueError(f"start and end differ in {sorted(trained.start.keys() ^ trained.end.keys())}")
    unknown = {*(trained.trained or ()), *(trained.gradient or ())} - trained.start.keys()
    if unknown:
        raise ValueError(f"trained or gradient names what is not in the model: {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class Law:
    """check(ask, case) raises Broken or NotAsked. case: on which, with micro-batches of one row; fewest: that it takes
    of these."""

    name: str
    statement: str
    check: Callable[[Asking, Case], None]
    case: Case
    fewest: int


LAWS: dict[str, Law] = {}
"""Every law by its name, in the order in which `check_trainer` tries them."""


def law(
    *, design: str = "alike", count: int = 4, size: int = 2, fewest: int = 1, **case: Any
) -> Callable[[Callable[[Asking, Case], None]], Callable[[Asking, Case], None]]:
    """Function decorator: enter a law under its own name; its docstring is the statement."""

    def add(check: Callable[[Asking, Case], None]) -> Callable[[Asking, Case], None]:
        statement = " ".join((check.__doc__ or "").split("\n\n")[0].split())
        LAWS[check.__name__] = Law(check.__name__, statement, check, Case(design, count, size, 1, **case), fewest)
        return check

    return add
