"""Sampled ahead: which rollouts are asked for before which step, while others are still learned from.

A version of the policy is the number of optimizer steps that it has taken. What is first learned from when f steps are
done is asked for when f - S are, S being `max_staleness`, and at the very beginning where that is before it. So the
policy of f - S samples it, S steps behind the one that first learns from it, never more; and when k steps are done, the
versions from k - S to k are all that a sampler can still be asked for. S = 1, and a step on each set:

    steps done      0             1             2             3
    asked for       0, 1          2             3             4
    of version      0             1             2             3
    learned from    set 0         set 1         set 2         set 3
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ...errors import UserError
from ..engines.protocol import Said

T = TypeVar("T")
H = TypeVar("H")


@dataclass(frozen=True)
class Flight(Generic[T, H]):
    """What was asked for. first: steps that are done when it is first learned from. said: what `ask` gave."""

    first: int
    item: T
    said: H


class Schedule(Generic[T, H]):
    """When each of several sets in turn is asked for. It has no clock: it is told how many steps are done.

    source: the sets to come. steps(item): how many learn from it. ask(item, first): begin to sample it. first: steps
    that are done when the next one is first learned from. total: of the run, beyond which nothing is asked for.
    """

    def __init__(
        self,
        source: Iterator[T],
        ask: Callable[[T, int], H],
        *,
        steps: Callable[[T], int],
        staleness: int,
        first: int,
        total: int,
    ) -> None:
        self.source, self.ask, self.steps = source, ask, steps
        self.staleness, self.first, self.total = staleness, first, total
        self.flights: deque[Flight[T, H]] = deque()
        self.failed: Exception | None = None  # what the source raised, for the step that would have learned from it

    def before(self, step: int) -> None:
        """So many steps are done: ask for what may be asked for. Raises what `ask` does."""
        while self.failed is None and self.first < self.total and self.first - self.staleness <= step:
            self._ask()

    def take(self) -> Flight[T, H]:
        """The next one in turn. Raises what the source raised of it."""
        if not self.flights and self.failed is None:
            self._ask()
        if not self.flights:
            assert self.failed is not None
            raise self.failed
        return self.flights.popleft()

    def _ask(self) -> None:
        try:
            item = next(self.source)
        except Exception as error:
            self.failed = error
            return
        self.flights.append(Flight(self.first, item, self.ask(item, self.first)))
        self.first += self.steps(item)


def check_staleness(said: Said, rows: Sequence[int], first: int, limit: int) -> None:
    """Raise UserError for a completion of a policy that is more than so many steps behind the one that first learns
    from it, which has taken `first`. rows: of the prompts, in the data set."""
    for row, samples in zip(rows, said, strict=True):
        for sample in samples:
            if not 0 <= first - sample.version <= limit:
                raise UserError(
                    f"a completion of row {row} of the data set is of the policy after step {sample.version}, and that "
                    f"after step {first} learns from it: refused with --max_staleness {limit}"
                )
