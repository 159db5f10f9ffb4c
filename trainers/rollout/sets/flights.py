"""The rollouts of steps to come: begun, awaited when they are learned from, left in a checkpoint.

Only what the engine does goes on in the background, which is HTTP. The adapter is pushed, rewards are called and
processes meet on the main thread, between two steps.
"""

from __future__ import annotations

import time
from collections import ChainMap, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from logratio.losses import Mean

from ...data.examples import Prompt
from ...errors import UserError
from ...processes.dealing import gather_rows, shares
from ...processes.once import raised_together
from ...window import Position
from ..engines.background import Begun
from ..engines.protocol import Said, Sample
from ..generation import numbered
from ..metrics import time_metrics, tokens_of
from .ahead import Schedule, check_staleness

Metrics = dict[str, Mean]


class Coming(NamedTuple):
    """A set of rollouts that is sampled at once, for one or more steps.

    prompts: this process's. places: theirs among those of all processes. counts: how many are of each step. steps: that
    learn from it, `passes` over these. position: where the data go on behind it.
    """

    prompts: Sequence[Prompt]
    places: Sequence[int]
    counts: list[int]
    steps: int
    position: Position

    @classmethod
    def of(
        cls,
        batches: Sequence[Sequence[Prompt]],
        accelerator: Accelerator,
        passes: int = 1,
        position: Position | None = None,
    ) -> Coming:
        """batches: of each step, of all processes."""
        prompts = numbered([prompt for some in batches for prompt in some])
        own = shares([len(some) for some in batches], accelerator)
        places = [place for some in own for place in some]
        return cls([prompts[i] for i in places], places, list(map(len, own)), len(batches) * passes, position or {})


UnderWay = Begun[Said] | Said | None
"""Begun; known from a checkpoint; or sampled when it is learned from."""


class Flights:
    """begin(prompts, first): let the engine sample what is first learned from when so many steps are done, of this
    process's prompts, by the policy as it is. staleness: see `Schedule`; 0: nothing is begun."""

    def __init__(self, begin: Callable[[Sequence[Prompt], int], Begun[Said]], staleness: int) -> None:
        self.begin, self.staleness = begin, staleness
        self.known: deque[Said] = deque()  # of the next sets, of all processes, from a checkpoint
        self.schedule: Schedule[Coming, UnderWay] | None = None

    def over(self, source: Iterator[Coming], accelerator: Accelerator, *, first: int, total: int) -> None:
        """Of these sets in turn; see `Schedule`."""
        self.accelerator = accelerator
        self.schedule = Schedule(
            source, self._ask, steps=lambda coming: coming.steps, staleness=self.staleness, first=first, total=total
        )

    def before(self, step: int) -> None:
        """So many steps are done, and the next has not begun: let be sampled what may be now. Called on all processes,
        which all raise what one does."""
        assert self.schedule is not None
        self.schedule.before(step)

    def land(self) -> tuple[Coming, Said | None, Metrics | None]:
        """The next set, what was sampled of this process's prompts, awaited, and metrics of that; None: nothing was
        begun. Called on all processes, which all raise what one does."""
        assert self.schedule is not None
        flight = self.schedule.take()
        if flight.said is None:
            return flight.item, None, None
        started, said = time.perf_counter(), []
        with raised_together(self.accelerator):
            said = result(flight.said)
            check_staleness(said, [prompt.row for prompt in flight.item.prompts], flight.first, self.staleness)
        waited = 1e3 * (time.perf_counter() - started)
        took = time_metrics(flight.said.seconds, tokens_of(said)) if isinstance(flight.said, Begun) else {}
        took["rollout_wait_ms"] = Mean(torch.tensor(waited), torch.tensor(1.0))
        behind = torch.tensor([[float(flight.first - s.version)] for samples in said for s in samples])
        behind, _ = gather_rows(self.accelerator, behind)
        stale = {
            "sampling/staleness_mean": Mean.of(behind),
            "sampling/staleness_max": Mean.of(behind.amax().view(1)),
        }
        return flight.item, said, stale | took

    def _ask(self, coming: Coming, first: int) -> UnderWay:
        if self.known:
            known = self.known.popleft()
            return [known[place] for place in coming.places]
        return self.begin(coming.prompts, first) if self.staleness else None

    def landed(self) -> list[list[list[dict[str, Any]]]]:
        """Of all sets in flight, in turn, the samples of all processes' prompts, in JSON's types; waits for them.
        Without those from the first one on that failed, which are sampled again when the run goes on."""
        own: list[dict[int, list[dict[str, Any]]]] = []
        if self.schedule is None or not self.staleness:
            return []
        for flight in self.schedule.flights:
            assert flight.said is not None
            try:
                said = result(flight.said)
            except UserError:
                break
            samples = [[plain(sample) for sample in of_prompt] for of_prompt in said]
            own.append(dict(zip(flight.item.places, samples, strict=True)))
        shares = [own] if self.accelerator.num_processes == 1 else gather_object([own])
        dealt = zip(*shares, strict=False)  # as many as every process has
        return [[samples for _, samples in sorted(ChainMap(*one).items())] for one in dealt]

    def restore(self, landed: Sequence[Sequence[Sequence[dict[str, Any]]]]) -> None:
        """The next sets have these samples."""
        self.known = deque([[Sample(**s) for s in samples] for samples in one] for one in landed)


def result(said: Begun[Said] | Said) -> Said:
    return said.result() if isinstance(said, Begun) else said


def plain(sample: Sample) -> dict[str, Any]:
    assert sample.support is None and sample.written is None and sample.told is None, "none of which a server says"
    return {name: getattr(sample, name) for name in ("ids", "finish_reason", "logps", "version")}
