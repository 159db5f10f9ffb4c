"""Our side: steps exactly as the loop takes them, over a few windows in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from logratio.trainers.data.examples import Example
from logratio.trainers.errors import UserError
from logratio.trainers.loop import Ahead, take, update
from logratio.trainers.resume import Progress
from logratio.trainers.step import learn
from logratio.trainers.window import Window

from ..measure.steps.contestants import computed_in, policy_logps, timed_parts
from .subject import Subject


class TooLarge(UserError):
    """A budget that the device has no memory for."""


class Ours:
    """The run as a contestant. Its gradient is that of one micro-batch, whatever the run's are."""

    def __init__(self, subject: Subject) -> None:
        run = subject.run
        self.subject, self.run = subject, run
        self.model, self.ref_model, self.optimizer = run.policy.model, subject.ref_model, run.optimizer
        self.attention = run.policy.attention

    def prepare(self, window: Sequence[Example], per_micro_batch: int | None = None) -> list[Example]:
        return list(window)

    def backward(self, batch: list[Example], following: Any = None) -> None:
        learn(self.run.step, self.subject.window(batch))

    def update(self) -> None:
        update(self.run, [], 1)

    def logps(self, examples: Sequence[Example]) -> Tensor:
        return policy_logps(self.run.policy, examples)

    def computed(self, window: Sequence[Example]) -> tuple[int, int]:
        return computed_in(self.subject.cut(window))

    def timed_parts(self, examples: Sequence[Example]) -> dict[str, float]:
        """As `contestants.timed_parts`."""
        run, subject = self.run, self.subject
        return timed_parts(
            run.step, subject.device, examples, lambda: subject.cut(examples), self.update, dealt=subject.grouped
        )


class Turns:
    """The run's steps with so many `micro_batch_tokens`, the next one packed while a device works, as in training."""

    def __init__(self, subject: Subject, tokens: int, only: int | None = None) -> None:
        self.subject, self.tokens = subject, tokens
        self.windows = subject.windows if only is None else [subject.windows[only]]
        self.progress = Progress()
        self.ahead = Ahead(self._source())

    def _source(self) -> Iterator[Window]:
        while True:
            for examples in self.windows:
                yield self.subject.window(examples)

    def __call__(self, round_: int = 0) -> None:
        """One optimizer step. TooLarge where it went on with a smaller budget."""
        step = self.subject.run.step
        step.micro_batch_tokens = self.tokens
        take(self.subject.run, self.ahead, self.progress, None)
        step.memory.take()
        if step.micro_batch_tokens != self.tokens:
            raise TooLarge(f"--micro_batch_tokens {self.tokens} does not fit; {step.micro_batch_tokens} does")


def settle(subject: Subject) -> None:
    """Take each of the steps, with as many tokens as fit. UserError where one example alone does not."""
    step = subject.run.step
    while True:
        turns = Turns(subject, step.micro_batch_tokens)
        try:
            for _ in subject.windows:
                turns()
            return
        except TooLarge as error:
            subject.notes.append(str(error))
