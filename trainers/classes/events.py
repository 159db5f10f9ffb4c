"""The events of transformers' callbacks, where the loop has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

from ..errors import UserError

NEVER = (
    *("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_prediction_step"),
    *("on_predict", "on_push_begin"),
)
"""Events that do not come: what a step does inside is not cut into them."""


class Events:
    """Calls callbacks as transformers' Trainer does, and keeps the state that they are shown.

    args, known: what callbacks are given beside state and control (model, processing_class, ...).
    """

    def __init__(self, callbacks: Sequence[Any], args: Any) -> None:
        self.callbacks = [one() if isinstance(one, type) else one for one in callbacks]
        for one in self.callbacks:
            if not isinstance(one, TrainerCallback):
                raise UserError(f"callbacks= must be TrainerCallbacks of transformers, got {type(one).__name__}")
        self.early = [one for one in self.callbacks if isinstance(one, EarlyStoppingCallback)]
        self.callbacks = [one for one in self.callbacks if one not in self.early]
        self.args = args
        self.known: dict[str, Any] = {}
        self.state, self.control = TrainerState(), TrainerControl()
        self.steps_per_epoch = math.inf

    def options(self) -> dict[str, Any]:
        """transformers' EarlyStoppingCallback as our option of its name."""
        for one in self.early:
            if one.early_stopping_threshold:
                raise UserError("EarlyStoppingCallback: early_stopping_threshold is not read; leave it out")
        return {"early_stopping_patience": self.early[0].early_stopping_patience} if self.early else {}

    def notes(self) -> list[str]:
        """What callbacks wait for in vain."""
        return [
            f"the callback {type(one).__name__} has {event}, which never comes: only what lies between steps is told"
            for one in self.callbacks
            for event in NEVER
            if getattr(type(one), event) is not getattr(TrainerCallback, event)
        ]

    def call(self, event: str, **more: Any) -> None:
        """Let all callbacks know."""
        for one in self.callbacks:
            found = getattr(one, event)(self.args, self.state, self.control, **self.known, **more)
            self.control = found or self.control

    def stepped(self, step: int) -> bool:
        """A step has been taken; returns whether a callback wants no more."""
        before = self.state.epoch or 0.0
        self.state.global_step = step
        self.state.epoch = step / self.steps_per_epoch
        self.call("on_step_end")
        if math.floor(self.state.epoch) > math.floor(before):
            self.call("on_epoch_end")
            self.call("on_epoch_begin")
        return self.control.should_training_stop

    def told(self, row: dict[str, float], saved: bool) -> None:
        """Its line of the log is written, and perhaps a checkpoint."""
        self.state.log_history.append(dict(row))
        evaluation = {name: value for name, value in row.items() if name.startswith("eval_")}
        if evaluation:
            self.call("on_evaluate", metrics={**evaluation, "epoch": row["epoch"]})
        self.call("on_log", logs=dict(row))
        if saved:
            self.call("on_save")
