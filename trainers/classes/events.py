"""The events of transformers' callbacks, where the loop has them."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

from ..errors import UserError
from ..logs.journal import read_chain

if TYPE_CHECKING:
    from ..resume import Progress
    from ..setup import Run

NEVER = (
    *("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_prediction_step"),
    *("on_predict", "on_push_begin"),
)
"""Events that do not come: what a step does inside is not cut into them."""
WISHES = {
    "should_save": "save_strategy and save_steps say when there are checkpoints",
    "should_evaluate": "eval_strategy and eval_steps say when it is evaluated",
    "should_epoch_stop": "should_training_stop ends the run",
}
"""What callbacks may set in transformers' control, and the loop does not follow -> what does it."""


class Events:
    """Calls callbacks as transformers' Trainer does, and keeps the state that they are shown.

    args, known: what callbacks are given beside state and control (model, processing_class, ...).
    """

    def __init__(self, callbacks: Sequence[Any], args: Any) -> None:
        self.callbacks: list[TrainerCallback] = []
        self.early: list[EarlyStoppingCallback] = []
        for one in callbacks:
            self.add(one)
        self.args = args
        self.wished: set[str] = set()
        self.known: dict[str, Any] = {}
        self.state, self.control = TrainerState(), TrainerControl()
        self.steps_per_epoch = math.inf

    def add(self, callback: Any) -> None:
        """One more, or its class; UserError for what is none."""
        one = callback() if isinstance(callback, type) else callback
        if not isinstance(one, TrainerCallback):
            raise UserError(f"callbacks= must be TrainerCallbacks of transformers, got {type(one).__name__}")
        if isinstance(one, EarlyStoppingCallback):
            self.early.append(one)
        else:
            self.callbacks.append(one)

    def pop(self, callback: Any) -> Any:
        """Take out a callback, or the first of a class; None where there is none."""
        for held in (self.callbacks, self.early):
            for one in held:
                if one is callback or type(one) is callback:
                    held.remove(one)  # type: ignore[arg-type]
                    return one
        return None

    def began(self, run: Run) -> None:
        """What a run knows once it is built."""
        self.steps_per_epoch = run.steps_per_epoch
        self.state.max_steps = run.total_steps
        self.state.num_train_epochs = math.ceil(run.total_steps / run.steps_per_epoch)
        self.state.is_world_process_zero = run.accelerator.is_main_process
        self.known = {"model": run.policy.model, "processing_class": run.tokenizer}
        self.known |= {"optimizer": run.optimizer, "lr_scheduler": run.scheduler}
        if run.checkpoint is not None:
            self.state.global_step = run.checkpoint.step
            self.state.epoch = run.checkpoint.step / run.steps_per_epoch
            self.state.log_history = lines_of(run.checkpoint.folder.parent, run.checkpoint.step)

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
        """Let all callbacks know. What they wish for beside an end is told once, and is not done."""
        for one in self.callbacks:
            found = getattr(one, event)(self.args, self.state, self.control, **self.known, **more)
            self.control = found or self.control
            for wish, instead in WISHES.items():
                if getattr(self.control, wish):
                    setattr(self.control, wish, False)
                    self._wished(f"the callback {type(one).__name__} sets {wish}, which nothing reads: {instead}")

    def _wished(self, line: str) -> None:
        if line not in self.wished and self.state.is_world_process_zero:
            print(line, file=sys.stderr, flush=True)
        self.wished.add(line)

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

    def told(self, row: dict[str, float], progress: Progress) -> None:
        """Its line of the log is written, and perhaps a checkpoint."""
        self.state.log_history.append(dict(row))
        if (best := progress.best).value is not None:
            folder = os.path.join(self.args.output_dir, f"checkpoint-{best.step}")
            self.state.best_metric, self.state.best_global_step = best.value, best.step
            self.state.best_model_checkpoint = folder if os.path.isdir(folder) else None
        evaluation = {name: value for name, value in row.items() if name.startswith("eval_")}
        if evaluation:
            self.call("on_evaluate", metrics={**evaluation, "epoch": row["epoch"]})
        self.call("on_log", logs=dict(row))
        if progress.saved == progress.step:
            self.call("on_save")


def lines_of(folder: Path, step: int) -> list[dict[str, float]]:
    """Of a run's log, up to a step; none where it has gone. What a kill has torn off ends it."""
    path = folder / "metrics.jsonl"
    rows = [row for row, _ in read_chain(path)] if path.exists() else []
    return [{k: v for k, v in row.items() if k != "hash"} for row in rows if row["step"] <= step]
