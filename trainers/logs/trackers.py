"""Trackers (`--report_to`), through accelerate's: each line of the log goes to all of them, from the main process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line

PROJECT = "logratio"
"""What a tracker files runs under; a run's own name is its output_dir."""
TENSORBOARD = "tensorboard"
"""Its folder in a run's."""
PACKAGES = {"comet_ml": "comet-ml"}


def chosen(names: Iterable[str]) -> list[str]:
    """Of --report_to: none without any, and all that are installed with "all". Raises UserError for one that is not."""
    names = dict.fromkeys(name for name in names if name != "none")
    if not names:
        return []
    from accelerate.tracking import get_available_trackers

    installed = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in names:
        if name not in (*installed, "all"):
            package = PACKAGES.get(name, name)
            raise UserError(f"--report_to {name}: {package} is not installed; pip install {package}, or leave it out")
    return installed if "all" in names else list(names)


class Trackers:
    """Of one run. names: `chosen` ones. after: the step behind which it goes on, in the same places; None: it begins.

    The main process alone has them, and does not end them through `Accelerator.end_training`, which ends the processes'
    group too.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any], after: int | None = None) -> None:
        self.names, self.folder, self.config, self.after = names, folder, config, after
        self.running: list[Any] = []

    def start(self) -> list[str]:
        """Open them; returns what to tell of those that could not be."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        notes = []
        for name in self.names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            place = {"logging_dir": self.folder} if kind.requires_logging_directory else {}
            try:
                tracker = kind(TENSORBOARD if name == TENSORBOARD else PROJECT, **place, **self._options(name))
                if hasattr(tracker, "start"):
                    tracker.start()
                if self.after is None:
                    tracker.store_init_configuration(flat(self.config))
            except Exception as error:
                notes.append(f"--report_to {name}: {first_line(error)}; the run goes on without")
                continue
            self.running.append(tracker)
        return notes

    def _options(self, name: str) -> dict[str, Any]:
        if name == TENSORBOARD:  # steps that are taken again count once
            return {} if self.after is None else {"purge_step": self.after + 1}
        if name == "trackio":
            return {"name": str(self.folder), "resume": "never" if self.after is None else "allow"}
        if name == "wandb":
            return {"name": str(self.folder), "dir": str(self.folder)}
        return {}

    def log(self, row: Mapping[str, Any]) -> list[str]:
        """One line of the log; returns what to tell of a tracker that failed, which is given up."""
        values = {name: value for name, value in row.items() if name != "step"}
        return self._each(lambda tracker: tracker.log(named_for(tracker.name, values), step=row["step"]))

    def close(self) -> list[str]:
        notes = self._each(lambda tracker: tracker.finish())
        self.running = []
        return notes

    def _each(self, call: Callable[[Any], Any]) -> list[str]:
        notes = []
        for tracker in list(self.running):
            try:
                call(tracker)
            except Exception as error:
                self.running.remove(tracker)
                notes.append(f"--report_to {tracker.name}: {first_line(error)}; the run goes on without")
        return notes


def named_for(tracker: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics by names that the tracker takes: MLflow has no @ in them."""
    return {name.replace("@", "_at_") if tracker == "mlflow" else name: value for name, value in values.items()}


def flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A configuration as trackers take it: one level, and text where a value is no number."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}/")
        else:
            found[before + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
