"""A run's folder, as `logratio train` has left it, or is still writing it."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logratio.trainers.errors import UserError, counted

LOG, CONFIG, CARD, SKIPPED = "metrics.jsonl", "run_config.json", "data_card.json", "skipped_rows.jsonl"
SAID = "notes.jsonl"
SECTIONS = ("loss", "model", "data", "train", "save", "rollout")
SAVED = ("adapter_config.json", "config.json")
"""Of which a folder with a trained model has one."""
EXAMPLES_SHOWN = 5
LARGEST = 1e300
"""Beyond it a value is none: JSON's integers have no end, and infinity has no place in a chart."""


@dataclass
class Column:
    """A metric of the log: its values, NaN for what is no finite number, and the steps that have one, in order."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    @property
    def last(self) -> float:
        """The last value; NaN where there is none."""
        return next((value for value in reversed(self.values) if not math.isnan(value)), math.nan)


@dataclass(frozen=True)
class Said:
    """A sentence of notes.jsonl. kind: note, alarm or end."""

    step: int
    kind: str
    text: str


@dataclass
class Run:
    """name: what the page calls it. columns: the log by metric. config: run_config.json. card: data_card.json, or
    empty. skipped: the first lines of skipped_rows.jsonl, of `num_skipped`. said: what the run has said, in order.
    notes: what of its files could not be read.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    columns: dict[str, Column]
    num_steps: int
    last_step: int
    card: dict[str, Any] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    num_skipped: int = 0
    said: list[Said] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def about(self) -> dict[str, Any]:
        return section(self.config, "about")

    @property
    def method(self) -> str:
        return str(self.config.get("method", ""))

    @property
    def saved(self) -> bool:
        """Whether the folder has a trained model."""
        return any((self.folder / name).is_file() for name in SAVED)

    def option(self, part: str, name: str) -> Any:
        return section(self.config, part).get(name)

    def known(self, metric: str) -> Column | None:
        """The metric, where the log has a value of it."""
        column = self.columns.get(metric)
        return None if column is None or math.isnan(column.last) else column

    def last(self, metric: str) -> float | None:
        """The metric's last value; None where the log has none."""
        column = self.known(metric)
        return None if column is None else column.last


def section(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """A part of run_config.json; empty where the file has none."""
    found = config.get(part)
    return found if isinstance(found, dict) else {}


def sets_of(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The data sets of a part of data_card.json."""
    found = part.get("sets")
    known = found if isinstance(found, list) else []
    return [one for one in known if isinstance(one, dict) and isinstance(one.get("examples"), int)]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """All of them, each by a name of its own. Raises UserError for a folder that is no run."""
    real = [folder.resolve() for folder in folders]
    if twice := [path for path, count in Counter(real).items() if count > 1]:
        raise UserError(f"{twice[0]} is given twice; a run is compared with others")
    return [read_run(folder, name) for folder, name in zip(folders, names_of(real), strict=True)]


def names_of(folders: Sequence[Path]) -> list[str]:
    """Of each folder as many last parts of its path as tell it from the others."""
    length = 1
    while True:
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names) or length > max(len(folder.parts) for folder in folders):
            return names
        length += 1


def read_run(folder: Path, name: str) -> Run:
    """Raises UserError where it is no run, has no step yet, or one of its files cannot be read."""
    try:
        return _read_run(folder, name)
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def _read_run(folder: Path, name: str) -> Run:
    for file in (LOG, CONFIG):
        if not (folder / file).is_file():
            what = f"has no {file}" if folder.is_dir() else "is no folder"
            raise UserError(f"{folder} {what}, so it is no run: give an --output_dir of `logratio train`")
    config = read_json(folder / CONFIG)
    if config is None:
        raise UserError(f"{folder / CONFIG} cannot be read as JSON: put the file of this run back")
    columns, num_steps, last_step, notes = read_log(folder / LOG)
    if not num_steps:
        raise UserError(f"{folder / LOG} has no step yet: wait for the first one")
    run = Run(folder, name, config, columns, num_steps, last_step, notes=notes)
    if (folder / CARD).exists():
        run.card = read_json(folder / CARD) or {}
        if not run.card:
            run.notes.append(f"{CARD} cannot be read")
    if (folder / SKIPPED).exists():
        for _, row in lines_of(folder / SKIPPED):
            run.num_skipped += 1
            if isinstance(row, dict) and len(run.skipped) < EXAMPLES_SHOWN:
                run.skipped.append(row)
    if (folder / SAID).exists():
        for number, one in lines_of(folder / SAID):
            if isinstance(one, dict) and type(one.get("step")) is int and isinstance(one.get("text"), str):
                run.said.append(Said(one["step"], str(one.get("kind")), one["text"]))
            else:
                run.notes.append(f"{SAID}: line {number} could not be read and is left out")
    if not run.saved:
        run.notes.append("no trained model is saved there: the run has not ended, or ended early")
    return run


def read_json(path: Path) -> dict[str, Any] | None:
    """What the file holds; None where that cannot be read, or is no object."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def lines_of(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of a file of JSON lines; None for a line that is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, json.loads(line)
            except ValueError:
                if line.strip():
                    yield number, None


def read_log(path: Path) -> tuple[dict[str, Column], int, int, list[str]]:
    """Columns, number of steps, the last step, and what to tell of lines that cannot be used.

    Where the steps go back, as in a log to which a run that went on from an earlier step has appended, what comes later
    counts.
    """
    columns: dict[str, Column] = {}
    count, last, bad, back, number = 0, 0, [], [], 0
    for number, row in lines_of(path):
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is not int or not 0 <= step < 2**53:
            bad.append(number)
            continue
        if count and step <= last:
            back.append(number)
            count -= cut(columns, step)
        count, last = count + 1, step
        for name, value in row.items():
            if type(value) in (int, float) and name != "step":
                column = columns.get(name)
                if column is None:
                    column = columns[name] = Column()
                column.steps.append(step)
                column.values.append(value if -LARGEST < value < LARGEST else math.nan)
    notes = []
    if bad and bad[-1] == number and not ends_whole(path):
        bad.pop()
        notes.append(f"{LOG}: its last line is cut off, and left out")
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        notes.append(f"{LOG}: {counted(len(bad), 'line')} could not be read and left out ({shown})")
    if back:
        notes.append(f"{LOG}: its steps go back at line {back[0]}; where a step comes twice, the later line counts")
    return columns, count, last, notes


def ends_whole(path: Path) -> bool:
    """Whether the file's last line has its end."""
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def cut(columns: dict[str, Column], step: int) -> int:
    """Take away all from a step on; returns how many steps that were."""
    gone: set[int] = set()
    for column in columns.values():
        while column.steps and column.steps[-1] >= step:
            gone.add(column.steps.pop())
            column.values.pop()
    return len(gone)
