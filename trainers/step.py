"""One optimizer step's gradient: totals over the whole step, then micro-batches that only add up.

Nothing here depends on how the step was cut: the totals are counted before the first forward pass, over all
micro-batches and processes, and every loss divides by them. What else a loss may know of the step is told, with a
picture, in `docs/totals.md`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from logratio.losses import Loss, Totals

from .batches.inputs import count_totals, loss_inputs, output_of, state_after
from .batches.packing import PackedBatch, example_tokens, pack, split_groups
from .batches.values import behavior_of, repacked
from .data.examples import Example
from .errors import UserError, listed
from .layers.casts import casts_kept
from .memory import Memory
from .optimizer import trained_parameters
from .policy.mismatch import mismatched, refer_together, together
from .policy.policy import Policy
from .policy.reference import Reference, StoredReference, inference
from .policy.teacher import Teacher, distributions
from .processes.dealing import deal, gather_rows, largest
from .processes.sharding import meet_inside
from .window import MicroBatch, StepResult, Window


def learn(step: Step, window: Window, meanwhile: Callable[[], None] | None = None) -> StepResult:
    """The window's gradient, added up, and this process's part of loss and metrics.

    A micro-batch that does not fit into memory changes how the window is cut, from here on, and nothing else.
    """

    def attempt() -> StepResult:
        cut_again(step, window)
        totals = step.totals(window.examples, window.micros, window.dealt)
        return step(window.micros, totals, meanwhile=meanwhile)

    result = step.memory.again(attempt)
    window.taken += 1
    return result


class Step:
    """What every step of a run shares: the policy, the loss, the reference, and how to cut micro-batches."""

    def __init__(
        self,
        accelerator: Accelerator,
        policy: Policy,
        loss: Loss,
        reference: Reference | None,
        *,
        micro_batch_tokens: int,
        max_length: int,
        pad_id: int = 0,
        teacher: Teacher | None = None,
    ) -> None:
        self.accelerator, self.policy, self.teacher = accelerator, policy, teacher
        self.loss, self.reference, self.max_length = loss, reference, max_length
        self.memory = Memory(accelerator, trained_parameters(policy), loss, micro_batch_tokens)
        self.packing: dict[str, Any] = {**policy.packing, "pad_id": pad_id}
        self.state: Mapping[str, float] = {}  # what the loss carries from step to step

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch; fewer than the run began with, where these did not fit into memory."""
        return self.memory.micro_batch_tokens

    @micro_batch_tokens.setter
    def micro_batch_tokens(self, tokens: int) -> None:
        self.memory.micro_batch_tokens = tokens

    def micro_batches(self, examples: Sequence[Example], dealt: bool = False) -> list[MicroBatch]:
        """This process's micro-batches of a step that all processes know (or, with `dealt`, of its own share).

        Every process gets the same number of them: sharded weights are gathered by all or none. One that has run out
        repeats its last with nothing scored.
        """
        mine = examples if dealt else [examples[i] for i in self._deal(examples)]
        return self._as_many(mine, examples[:1])

    def _as_many(self, mine: Sequence[Example], other: Sequence[Example]) -> list[MicroBatch]:
        """This process's micro-batches, as many as any process has; other: what one without an example repeats."""

        def packed(examples: Sequence[Example]) -> list[PackedBatch]:
            return pack(examples, self.micro_batch_tokens, scores_prompt=self.loss.scores_prompt, **self.packing)

        batches = packed(mine) if mine else []
        if missing := int(largest(self.accelerator, len(batches))) - len(batches):
            batches += [(batches or packed(other))[-1].unscored()] * missing
        budget, here = self.micro_batch_tokens, [batch.to(self.accelerator.device) for batch in batches]
        behaviors = [behavior_of(batch) if self.loss.wants_behavior else None for batch in here]
        return [MicroBatch(b, behavior=sampled, budget=budget) for b, sampled in zip(here, behaviors, strict=True)]

    def _deal(self, examples: Sequence[Example]) -> list[int]:
        return deal([example_tokens(example, self.policy.shared) for example in examples], self.accelerator)

    def fill_reference(self, micros: Sequence[MicroBatch]) -> None:
        """Compute the reference's log-probabilities where the loss wants them and they are not there yet."""
        if self.reference is not None:
            for micro in micros:
                if micro.ref is None:
                    micro.ref = self._refer(micro.batch)

    def _refer(self, batch: PackedBatch, *, live: bool = False) -> Tensor:
        """live: compute it, whatever is stored."""
        reference = self.reference.live if live and isinstance(self.reference, StoredReference) else self.reference
        assert reference is not None
        with self.memory.fitting(batch):
            return reference(batch)

    def fill_old(self, micros: Sequence[MicroBatch]) -> None:
        """Fix the log-probabilities that later updates on the same rollouts are compared with."""
        for micro in micros:
            with self.memory.fitting(micro.batch), inference(self.policy):
                micro.old = self.policy(micro.batch).logps

    def totals(self, examples: Sequence[Example], micros: Sequence[MicroBatch], dealt: bool = False) -> Totals:
        """Totals over the step and all processes, with what the loss collects in a pass before it."""
        totals = dataclasses.replace(count_totals(examples, self.loss), state=self.state)
        if dealt and self.accelerator.num_processes > 1:
            counts = {k: v for k, v in dataclasses.asdict(totals).items() if isinstance(v, int | float)}
            summed = self.accelerator.reduce(
                torch.tensor(list(counts.values()), dtype=torch.float64, device=self.accelerator.device), "sum"
            )
            totals = dataclasses.replace(totals, **dict(zip(counts, summed.tolist(), strict=True)))
        if self.loss.window_pass is None:
            return totals
        passed = micros
        if self.loss.window_pass == "mismatched":
            if len(examples) < 2:
                return totals
            passed = self._mismatched(examples, micros)
        return dataclasses.replace(totals, collected=self._collect(passed))

    def _mismatched(self, examples: Sequence[Example], micros: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Micro-batches of mismatched completions, of the prompts that this process has, with their reference; fills
        that of `micros` too, in one pass over both completions of a prompt, unless it is stored."""
        others, mine = mismatched(examples, self.max_length), self._deal(examples)
        passed = self._as_many([others[i] for i in mine], others[:1])
        if isinstance(self.reference, StoredReference):
            # on every process alike, whatever happens to be in the table
            refs = self.memory.together(lambda: [self._refer(micro.batch, live=True) for micro in passed])
            for micro, ref in zip(passed, refs, strict=True):
                micro.ref = ref
        elif self.reference is not None and self.policy.shared:
            pairs = [together(examples[i], others[i], self.micro_batch_tokens) for i in mine]
            both = self._as_many([example for pair in pairs for example in pair], examples[:1])
            filled = [*micros, *passed]
            batches = [[m.batch for m in both], [m.batch for m in filled]]
            refs = self.memory.together(lambda: refer_together(self._refer, *batches))
            for micro, ref in zip(filled, refs, strict=True):
                micro.ref = ref
        return passed

    def _collect(self, micros: Sequence[MicroBatch]) -> Tensor:
        """What the loss collects of the micro-batches, of all processes in order; tells each micro-batch its rows."""

        def passes() -> list[Tensor]:
            self.fill_reference(micros)
            values = []
            for micro in micros:
                with self.memory.fitting(micro.batch), inference(self.policy):
                    out = self.policy(micro.batch)
                    inputs = loss_inputs(self.loss, micro.batch, out, micro.ref, micro.old, micro.behavior)
                    collected = self.loss.collect(**inputs)
                    values.append(collected[:0] if micro.batch.is_filler else collected)
            return values

        values = self.memory.together(passes)
        everyone, mine = gather_rows(self.accelerator, torch.cat(values))
        start = mine.start or 0
        for micro, part in zip(micros, values, strict=True):
            rows = len(micro.batch.examples)
            # a filler has nothing scored; its rows stand for nothing and may be any
            micro.own = torch.arange(start, start + rows, device=everyone.device) * (not micro.batch.is_filler)
            start += len(part)
        return everyone

    def __call__(
        self,
        micros: Sequence[MicroBatch],
        totals: Totals,
        *,
        backward: bool = True,
        meanwhile: Callable[[], None] | None = None,
    ) -> StepResult:
        """Run the micro-batches, add up their gradients, over all processes, and return this process's part of loss and
        metrics.

        meanwhile: called when all is launched, and a device still at work; again where the step is tried again. Raises
        UserError where a loss is not finite, naming the rows of its micro-batch.
        """
        result = StepResult(torch.zeros((), device=self.accelerator.device))
        losses: list[Tensor] = []
        # sharded gradients are averaged over processes, and the totals have divided already
        factor = self.accelerator.num_processes if meet_inside(self.accelerator) else 1

        @casts_kept()  # but not around `meanwhile`: graphs that it captures would outlive what is kept here
        def passes() -> None:
            self.fill_reference(micros)
            for micro in micros:
                with self.memory.fitting(micro.batch), torch.set_grad_enabled(backward):
                    out = self.policy(micro.batch, **distributions(self.teacher, self.loss, micro.batch))
                    micro.logps = None if micro.behavior is None else out.logps.detach()
                    inputs = loss_inputs(self.loss, micro.batch, out, micro.ref, micro.old, micro.behavior)
                    output = output_of(self.loss, inputs, dataclasses.replace(totals, own=micro.own))
                    if backward:
                        self.accelerator.backward(output.loss * factor)
                losses.append(output.loss.detach())
                result.add(output.loss, output.metrics)

        self.memory.together(passes, backward=backward, meanwhile=meanwhile)
        for micro, finite in zip(micros, torch.stack(losses).isfinite().tolist(), strict=True):
            if not finite:
                rows = rows_of(micro.batch.examples)
                raise UserError(f"the loss is not finite; its micro-batch holds the rows {rows} of the data set")
        if backward:
            self.state = state_after(self.loss, totals)
        return result


def cut_again(step: Step, window: Window) -> None:
    """Pack the window by today's budget, where it was packed by another.

    What its later steps are compared with stays, as it was computed before its first; until that is taken, it is
    computed anew, as it would have been from the start.
    """
    before, budget = window.micros, step.micro_batch_tokens
    if all(micro.budget in (None, budget) for micro in before):
        return
    parts = split_groups(window.examples, budget, step.policy.shared) if window.dealt else window.examples
    window.micros = step.micro_batches(parts, window.dealt)
    if not window.taken:
        if before[0].old is not None:
            step.memory.together(lambda: step.fill_old(window.micros))
        return
    batches = [micro.batch for micro in window.micros]
    refs = [(m.batch, m.ref) for m in before if m.ref is not None]
    olds = [(m.batch, m.old) for m in before if m.old is not None]
    for micro, ref in zip(window.micros, repacked(refs, batches), strict=bool(refs)):
        micro.ref = ref
    for micro, old in zip(window.micros, repacked(olds, batches), strict=bool(olds)):
        micro.old = old


def rows_of(examples: Sequence[Example]) -> str:
    """The examples' rows in the data set, for a message."""
    return listed(sorted({e.row for e in examples}))
