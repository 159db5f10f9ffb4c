"""What a run leaves behind while it runs: metrics.jsonl, notes.jsonl, completions.parquet, run_config.json,
data_card.json and skipped_rows.jsonl."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.live import Live

from ..errors import Stopped, UserError, first_line
from .completions import FOLDER, CompletionParts
from .journal import Journal
from .notes import NOTES, Kind, Notes
from .samples import best_and_worst
from .screen import WIDE, Screen, evaluation_of, figures_of
from .streams import Lasting
from .trackers import TENSORBOARD, Trackers

SKIPPED, DATA_CARD = "skipped_rows.jsonl", "data_card.json"
SAMPLE_S = 5.0
"""Seconds for which a sample is shown, at the least."""


class RunLog:
    """Writes one JSON line a step and shows progress; silent on all processes but the main one.

    quiet: writes the files, but shows nothing. after: (step, hash) of the line of metrics.jsonl behind which the run
        goes on, in the folder `began`, where that is another than its own; None: it begins. report_to: trackers, see
        `trackers.chosen`. planned: the peak of memory that was predicted, in MiB. Its `at` is the step
        that is being taken, which what is said is of.
    """

    def __init__(
        self,
        output_dir: str,
        config: dict[str, Any],
        *,
        total_steps: int,
        main: bool = True,
        quiet: bool = False,
        after: tuple[int, str] | None = None,
        began: Path | None = None,
        report_to: Sequence[str] = (),
        planned: float | None = None,
    ) -> None:
        self.folder, self.main, self.total_steps = Path(output_dir), main, total_steps
        shown: Any = None if sys.stdout is None else Lasting(sys.stdout)
        self.console = Console(file=shown, quiet=quiet or not main, soft_wrap=True)
        self.first = self.at = after[0] if after else 0
        if not main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        log, text = self.folder / "metrics.jsonl", json.dumps(config, indent=2, default=str) + "\n"
        if after is None:
            for name in (log.name, NOTES, FOLDER, "run_config.json", SKIPPED, DATA_CARD, TENSORBOARD):
                keep_earlier(self.folder / name)
        elif began is not None and began.resolve() != self.folder.resolve():
            for name in (log.name, NOTES, FOLDER, TENSORBOARD):
                keep_earlier(self.folder / name)
                if (began / name).is_dir():
                    shutil.copytree(began / name, self.folder / name)
                elif (began / name).exists():
                    shutil.copyfile(began / name, self.folder / name)
        behind = after[0] if after else None
        self.journal = Journal(log, after)
        self.notes, self.parts = Notes(self.folder, behind), CompletionParts(self.folder, behind)
        settings = self.folder / "run_config.json"
        if not settings.exists() or settings.read_text() != text:
            write_text(settings, text, aside=True)
        self.waiting: set[Path] = set()  # of which it was said that it waits
        self.shown = self.first  # the last step of which completions were
        self.trackers = Trackers(report_to, self.folder, config, behind)
        has = config.get("about", {}).get("device_mem_mib")
        self.screen = Screen(total_steps, self.first, planned=planned, has=has)
        self.sampled = float("-inf")  # when, in seconds
        self.live = Live(console=self.console, get_renderable=lambda: self.screen)

    def __enter__(self) -> RunLog:
        if self.main:
            if self.console.is_terminal:
                self.live.start()
            self._note_all(self.trackers.start())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.main:
            self._note_all(self.trackers.close())
            if error is not None:
                told = isinstance(error, UserError | Stopped)
                self.notes.add(self.at, "end", str(error) if told else f"{type(error).__name__}: {first_line(error)}")
            self.live.stop()
            self.journal.close()

    @property
    def last(self) -> dict[str, Any]:
        """The line behind which the run goes on."""
        return self.journal.last if self.main else {}

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def note(self, text: str, kind: Kind = "note") -> None:
        """Say it, and keep it in notes.jsonl."""
        self.say(text)
        if self.main:
            self.notes.add(self.at, kind, text)

    def _note_all(self, notes: Sequence[str]) -> None:
        for text in notes:
            self.note(text)

    def alarm(self, text: str) -> None:
        """Say and keep what may be wrong, and leave it on the screen until there is another."""
        self.note(text, "alarm")
        if self.main:
            self.screen.alarm = text

    def list_skipped(self, rows: list[dict[str, Any]]) -> None:
        """One line of skipped_rows.jsonl for each; no file where there are none."""
        if self.main and rows:
            path = self.folder / SKIPPED
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
            self.say(f"skipped rows are listed in {path}")

    def keep_card(self, card: dict[str, Any]) -> None:
        """Write what became of the rows into data_card.json, in the place of what was known before. A disk that does
        not take it costs no run."""
        if not self.main:
            return
        try:
            write_text(self.folder / DATA_CARD, json.dumps(card, indent=2) + "\n")
        except UserError as error:
            self.say(str(error))

    def flush(self) -> str:
        """Let all lines be on the disk; returns the hash of the last. Raises UserError where it does not take them."""
        if not self.main:
            return ""
        self.journal.flush()
        self.notes.flush()
        self.parts.flush()
        return self.journal.hash

    def step(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and on the screen."""
        if not self.main:
            return
        self.journal.append(row)
        self._tell_of(self.journal.path, self.journal.problem, "its lines wait")
        self._note_all(self.trackers.log(row))
        self.screen.add(row)
        step, total = row["step"], self.total_steps
        if self.console.is_terminal:
            return
        if step in (self.first + 1, total) or step % max(1, total // 20) == 0:
            figures = "  ".join(f"{name} {row[name]:.4g}" for name in (*figures_of(row), "tokens_per_s") if name in row)
            self.say(f"step {step}/{total}  {figures}  {self.screen.left or 0:.0f} s left")
        if evaluated := evaluation_of(row):
            self.say(f"step {step}/{total} evaluated  {evaluated}")

    def sample(self, make: Callable[[], list[tuple[str, str]]]) -> None:
        """Show another sample of what is trained on, where there is a place for one and the last was read. make: calls
        for (what, text) of its prompt and of what follows."""
        now = time.monotonic()
        if self.main and self.console.is_terminal and self.console.width >= WIDE and now - self.sampled >= SAMPLE_S:
            self.sampled, self.screen.sample = now, make()

    def completions(self, rows: Sequence[dict[str, Any]], every: int) -> None:
        """Keep what a step has sampled, and show two of it every so many steps; 0: never."""
        if not (self.main and rows):
            return
        step = rows[0]["step"]
        self.parts.add(step, rows)
        self._tell_of(self.parts.path, self.parts.problem, "completions wait")
        if every and step - self.shown >= every:
            self.shown = step
            for line in best_and_worst(rows, self.console.width):
                self.say(line)

    def _tell_of(self, path: Path, problem: str | None, what: str) -> None:
        """Once, that a file cannot be written; again, when it could be in between."""
        if problem is None:
            self.waiting.discard(path)
        elif path not in self.waiting:
            self.waiting.add(path)
            self.say(f"{path} cannot be written ({problem}): {what}")


def keep_earlier(path: Path) -> None:
    """Move the file of an earlier run aside, to NAME.1.SUFFIX and so on: a run never overwrites another's log."""
    if not path.exists():
        return
    number = 1
    while (moved := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(moved)


def write_text(path: Path, text: str, *, aside: bool = False) -> None:
    """Whole or not at all. aside: the file that was there is moved there, not replaced. Raises UserError where the disk
    does not take it."""
    partial = path.with_name(f".{path.name}")
    try:
        partial.write_text(text)
        if aside:
            keep_earlier(path)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(
            f"{path} could not be written: {error.strerror}; make room, or choose another folder"
        ) from error


def reset_peak_mem(device: torch.device) -> None:
    """Let `peak_mem_mib` count from here on; without effect on a CPU whose system is not Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mem_mib(device: torch.device) -> float:
    """Peak of allocated GPU memory, or of the process's resident memory on a CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
