"""The best evaluation so far, and for how many in turn there was no better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..config import SaveConfig
from ..errors import UserError


@dataclass
class Best:
    """value: of the metric, at step `step`; None: there was no evaluation. since: evaluations after it."""

    value: float | None = None
    step: int = 0
    since: int = 0

    def look(self, options: SaveConfig, step: int, row: Mapping[str, float]) -> None:
        """Take note of an evaluation. Raises UserError where it has no such metric."""
        if options.metric not in row:
            known = ", ".join(sorted(name for name in row if name.startswith("eval_")))
            raise UserError(f"--metric_for_best_model {options.metric}: the evaluation has only {known}")
        value = row[options.metric]
        better = self.value is None or (value > self.value if options.greater else value < self.value)
        if better and not math.isnan(value):
            self.value, self.step, self.since = value, step, 0
        else:
            self.since += 1

    def ends(self, options: SaveConfig) -> bool:
        """Whether there was no better one for so long that training ends."""
        return options.early_stopping_patience is not None and self.since >= options.early_stopping_patience
