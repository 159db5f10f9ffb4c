"""What tells that a run has gone wrong though all its numbers are finite: said once each, or the end of the run.

A loss that has exploded ends the run, since what follows costs time and takes the room of good checkpoints. It has
exploded where it is far beyond both where it began and what blind guessing costs (ln V nats a token, V the vocabulary),
for five steps on end. Far is 10 times for sequences, whose loss is in nats a token, so that such a model is worse than
none; 100 times for others, whose losses may be squares or sums over a completion. Where it began is its value at the
first step, before any update: a bound that follows the loss would let it creep up. What guessing costs is for losses
that begin near 0 (of rollouts, 0 on policy, and in some variants weighed by the completion's length, as it is here).
A training loss so far above its own beginning for so long is no warm-up, no other part of the data, and no spike. In
the last steps of a run, which are too few to end it for, it is said.

A gradient's norm that is 1,000 times beyond both where it began and what it is clipped to, for five steps on end, is
only said: clipping takes the size out of it, and its direction may be good.

A gradient of exactly 0, and a loss that is 0 in float32 (below 2^-24: every sigmoid of a margin is 1, or every token
certain), for five steps on end, are said: nothing is learned any more, or never was.

Rollouts whose tokens were sampled with other log-probabilities than those that are trained, by more than 0.05 nats on
average, for five steps on end, are said: ratios of them are off by as much, and nobody has asked to correct for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logratio.losses import Kind, Loss

from .errors import UserError

STEPS = 5
"""On end, that make a finding: of fewer, one may be an accident."""
GRADIENT_FACTOR = 1000.0
VANISHED = 2.0**-24
DRIFT = 0.05
"""Nats a token: a 16-bit sampler is within 0.01 of a 32-bit trainer."""


class Health:
    """Looks at every step's loss and gradient norm, those of all processes.

    vocabulary: of the model. max_grad_norm: what gradients are clipped to; 0: not at all. folder: of the checkpoints.
    """

    def __init__(self, loss: Loss, vocabulary: int, max_grad_norm: float, folder: str | Path) -> None:
        self.rollouts = loss.kind is Kind.GROUPED
        self.corrected = getattr(loss, "sampling_correction", "none") != "none"
        longest = getattr(loss, "max_completion_length", 1) if self.rollouts else 1
        self.units = {"loss": math.log(vocabulary) * longest, "grad_norm": max_grad_norm or 1.0}
        self.factors = {"loss": 10.0 if loss.kind is Kind.SEQUENCE else 100.0, "grad_norm": GRADIENT_FACTOR}
        self.folder = Path(folder)
        self.began: dict[str, float] = {}
        self.streaks: dict[str, int] = {}
        self.told: set[str] = set()

    def after(self, step: int, row: Mapping[str, Any], *, last: bool = False) -> list[str]:
        """What there is to tell of a step. Raises UserError where its loss has exploded. last: of the run."""
        loss, norm = row["loss"], row["grad_norm"]
        notes = []
        if streak := self._streak("exploded", self._far("loss", abs(loss))):
            said = f"the loss is {loss:.3g}, {self._beyond('loss')} blind guessing costs"
            if streak == STEPS:
                raise UserError(f"step {step}: {said}, for {STEPS} steps on end: {self._remedy(step)}")
            if last:
                notes.append(f"step {step}, the last: {said}; what is saved may be of no use")
        steep = math.isfinite(norm) and self._far("grad_norm", norm)  # a gradient scaler overflows on purpose
        drift = row.get("sampling/logp_diff_mean", 0.0)
        vanished = not self.rollouts and 0 <= loss <= VANISHED
        for name, holds, text in (
            (
                "steep",
                steep,
                f"the gradient's norm is {norm:.3g}, {self._beyond('grad_norm')} it is clipped to: lower "
                "--learning_rate, or look at the data",
            ),
            ("zero", norm == 0, "the gradient is exactly 0, and nothing is learned: is --learning_rate too high?"),
            (
                "drift",
                drift > DRIFT and not self.corrected,
                f"tokens were sampled with log-probabilities that differ from those trained by {drift:.2g} nats on "
                "average: --keep_sampling_mask where top_p, top_k or min_p cut some off, else --sampling_correction",
            ),
            ("vanished", vanished, "the loss is 0 in float32, no margin or token in doubt: nothing is left to learn"),
        ):  # fmt: skip
            if self._streak(name, holds) == STEPS and name not in self.told:
                self.told.add(name)
                notes.append(f"up to step {step}, for {STEPS} steps on end, {text}")
        return notes

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, in JSON's types: a run that goes on says nothing twice, and forgets no beginning."""
        return {"began": dict(self.began), "streaks": dict(self.streaks), "told": sorted(self.told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.began, self.streaks = dict(state["began"]), dict(state["streaks"])
        self.told = set(state["told"])

    def _far(self, name: str, value: float) -> bool:
        """Whether it is far beyond the beginning, which the first value is."""
        return value > self.factors[name] * max(self.units[name], self.began.setdefault(name, value))

    def _beyond(self, name: str) -> str:
        return f"more than {self.factors[name]:g} times what it began with and"

    def _streak(self, name: str, holds: bool) -> int:
        """For how many steps on end it has held."""
        self.streaks[name] = self.streaks.get(name, 0) + 1 if holds else 0
        return self.streaks[name]

    def _remedy(self, step: int) -> str:
        """A step's loss is of the weights before its update, so the first of these tells of the update before it."""
        saved = [path.name.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*")]
        good = [int(number) for number in saved if number.isdecimal() and int(number) < step - STEPS]
        where = f"the last good checkpoint is {self.folder / f'checkpoint-{max(good)}'}" if good else (
            "there is no checkpoint from before (--save_steps)"
        )  # fmt: skip
        return f"{where}; lower --learning_rate, or add --warmup_steps"
