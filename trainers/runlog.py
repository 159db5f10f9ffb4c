"""What a run leaves behind while it runs: metrics.jsonl, run_config.json, skipped_rows.jsonl, a progress line."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .streams import Lasting

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "kl", "reward", "tokens_per_s")


SKIPPED = "skipped_rows.jsonl"


class RunLog:
    """Writes one JSON line a step and shows progress; silent on all processes but the main one.

    quiet: writes the files, but shows nothing.
    """

    def __init__(
        self, output_dir: str, config: dict[str, Any], *, total_steps: int, main: bool = True, quiet: bool = False
    ) -> None:
        self.folder, self.main, self.total_steps = Path(output_dir), main, total_steps
        shown: Any = None if sys.stdout is None else Lasting(sys.stdout)
        self.console = Console(file=shown, quiet=quiet or not main, soft_wrap=True)
        self.started = time.perf_counter()
        if not main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "run_config.json", SKIPPED):
            keep_earlier(self.folder / name)
        (self.folder / "run_config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
        self.file = (self.folder / "metrics.jsonl").open("w", buffering=1)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> RunLog:
        if self.main:
            self.progress.start()
            self.task = self.progress.add_task("step", total=self.total_steps, figures="")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.main:
            self.progress.stop()
            self.file.close()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def list_skipped(self, rows: list[dict[str, Any]]) -> None:
        """One line of skipped_rows.jsonl for each; no file where there are none."""
        if self.main and rows:
            path = self.folder / SKIPPED
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            self.say(f"skipped rows are listed in {path}")

    def step(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and on the screen."""
        if not self.main:
            return
        self.file.write(json.dumps(row) + "\n")
        figures = "  ".join(f"{name} {row[name]:.4g}" for name in SHOWN if name in row)
        if self.console.is_terminal:
            self.progress.update(self.task, completed=row["step"], figures=figures)
        elif row["step"] in (1, self.total_steps) or row["step"] % max(1, self.total_steps // 20) == 0:
            left = (time.perf_counter() - self.started) / row["step"] * (self.total_steps - row["step"])
            self.say(f"step {row['step']}/{self.total_steps}  {figures}  {left:.0f} s left")


def keep_earlier(path: Path) -> None:
    """Move the file of an earlier run aside, to NAME.1.SUFFIX and so on: a run never overwrites another's log."""
    if not path.exists():
        return
    number = 1
    while (moved := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(moved)


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
