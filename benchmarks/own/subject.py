"""What is measured: the run that `logratio train` would begin, and the data of its first steps.

Everything comes from the run's own setup (`trainers/setup.py`), in a folder that is gone afterwards; steps are those of
its loop (`ours.py`). The data are the first steps' own, packed and sampled as the run would.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logratio.losses import Kind
from logratio.trainers.batches.packing import split_groups
from logratio.trainers.batches.values import by_completion, of_completions
from logratio.trainers.config import RunConfig, SaveConfig
from logratio.trainers.data.examples import Example
from logratio.trainers.errors import UserError
from logratio.trainers.loop import count_tokens
from logratio.trainers.policy.reference import StoredReference, precompute, reference_model, tokens_key
from logratio.trainers.rollout.sets.windows import roll_out
from logratio.trainers.setup import Run, batches, build
from logratio.trainers.window import MicroBatch, Window

from ..measure.clock import wait
from ..measure.steps.contestants import OldLogps

ENDLESS = 2**62
"""Steps of a run that is never at its end, where the loop would not pack ahead."""
EQUAL = (
    "all rewards were equal, so that nothing would be learned; the measured steps have advantages of 1 and -1 in turn, "
    "which changes no time"
)
UNCOUNTED = "--precompute_ref_log_probs: of the measured steps alone; the pass over all data is not in any figure"


@dataclasses.dataclass
class Subject:
    """run: built. windows: the examples of its first steps. rollout_ms: what sampling and rewarding each of them took.
    known: of rollouts, what was computed with them, {"old" or "ref": {id of a completion: its log-probs}}."""

    run: Run
    windows: list[list[Example]]
    rollout_ms: list[float]
    notes: list[str]
    known: dict[str, dict[int, Tensor]] = dataclasses.field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.run.accelerator.device

    @property
    def grouped(self) -> bool:
        return bool(self.run.config.loss.kind is Kind.GROUPED)

    @property
    def heaviest(self) -> int:
        """The window with most tokens."""
        return max(range(len(self.windows)), key=lambda i: count_tokens(self.windows[i]))

    @property
    def ref_model(self) -> Any:
        """The reference's weights, where it has its own."""
        return self._weights(self.run.step.reference)

    @property
    def teacher_model(self) -> Any:
        return self._weights(self.run.step.teacher)

    @staticmethod
    def _weights(of: Any) -> Any:
        other = reference_model(of)
        return None if other is None else other.model

    def cut(self, examples: Sequence[Example]) -> list[MicroBatch]:
        """Micro-batches by the step's `micro_batch_tokens`, with what is known of rollouts."""
        step = self.run.step
        parts = examples
        if self.grouped:
            parts = split_groups(examples, step.micro_batch_tokens, step.policy.shared)
        micros = step.micro_batches(parts, dealt=self.grouped)
        for name, table in self.known.items():
            for micro in micros:
                setattr(micro, name, of_completions(micro.batch, table))
        return micros

    def window(self, examples: Sequence[Example]) -> Window:
        """What the loop takes a step on."""
        return Window(examples, self.cut(examples), dealt=self.grouped)

    def of_rollouts(self, name: str) -> OldLogps | None:
        """What is known of the rollouts, by example; None where nothing is."""
        table = self.known.get(name)
        if table is None:
            return None
        return {tokens_key(e): [table[id(c)] for c in e.completions] for w in self.windows for e in w}

    def reference_logps(self) -> OldLogps | None:
        """Of every completion, under the reference; None without one."""
        reference = self.run.step.reference
        if reference is None:
            return None
        packing = self.run.policy.packing
        examples = [example for window in self.windows for example in window]
        return precompute(reference, examples, self.run.step.micro_batch_tokens, self.device, **packing)


def build_subject(
    config: RunConfig, folder: Path, count: int, say: Callable[[str], None] = lambda line: None
) -> Subject:
    """The run in a folder of its own, and its first `count` steps' data. UserError for what does not fit, and where it
    is one process of several."""
    stored = config.model.precompute_ref_log_probs
    run = build(undisturbing(config, folder), saves=False)
    if run.accelerator.num_processes > 1:
        raise UserError("`logratio bench` measures one process: start it without a launcher")
    run.total_steps = ENDLESS
    subject = Subject(run, [], [], list(run.notes))
    items = first_items(run, count)
    if run.rollouts is None:
        subject.windows = items
    else:
        sample(subject, items, say)
    if stored and run.step.reference is not None:
        run.step.reference = StoredReference(subject.reference_logps() or {}, run.step.reference, run.accelerator)
        run.config = dataclasses.replace(
            run.config, model=dataclasses.replace(run.config.model, precompute_ref_log_probs=True)
        )
        subject.notes.append(UNCOUNTED)
    return subject


def undisturbing(config: RunConfig, folder: Path) -> RunConfig:
    """The same run, in another folder, without trackers, checkpoints and what grows while it runs."""
    train = dataclasses.replace(
        config.train,
        output_dir=str(folder),
        overwrite_output_dir=False,
        report_to=("none",),
        micro_batch_tokens=config.train.first_micro_batch_tokens,
    )
    model = dataclasses.replace(config.model, precompute_ref_log_probs=False)
    return dataclasses.replace(config, train=train, model=model, save=SaveConfig())


def first_items(run: Run, count: int) -> list[list[Any]]:
    """Of the first steps, in the run's own order; of fewer examples than the first, as at an epoch's end, none."""
    config = run.config
    size = config.train.batch_size
    assert size is not None
    steps = batches(run.data.train, size, shuffle=config.data.shuffle, seed=config.train.seed)
    found = [list(items) for items, _ in itertools.islice(steps, count)]
    return [items for items in found if len(items) == len(found[0])]


def sample(subject: Subject, items: Sequence[list[Any]], say: Callable[[str], None]) -> None:
    """Rollouts of each step's prompts, and the time that they took."""
    run = subject.run
    assert run.rollouts is not None
    known: dict[str, dict[int, Tensor]] = {"old": {}, "ref": {}}
    for number, prompts in enumerate(items, 1):
        say(f"rollouts of step {number} of {len(items)}")
        wait(subject.device)
        started = time.perf_counter()
        window = roll_out(run.rollouts, run.step, prompts)
        wait(subject.device)
        subject.rollout_ms.append((time.perf_counter() - started) * 1e3)
        subject.windows.append(list(window.examples))
        for name, table in known.items():
            values = [(micro.batch, getattr(micro, name)) for micro in window.micros]
            table |= by_completion((batch, logps) for batch, logps in values if logps is not None)
        run.rollouts.keeper.taken()
    subject.known = {name: table for name, table in known.items() if table}
    subject.notes += run.rollouts.after(0)
    if not any(a for window in subject.windows for example in window for a in example.advantages or ()):
        subject.windows = [with_advantages(window) for window in subject.windows]
        subject.notes.append(EQUAL)


def with_advantages(window: Sequence[Example]) -> list[Example]:
    """Each group with 1 and -1 in turn."""
    return [
        dataclasses.replace(e, advantages=tuple(1.0 - 2.0 * (i % 2) for i in range(len(e.completions)))) for e in window
    ]
