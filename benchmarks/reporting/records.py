"""What a benchmark leaves behind: one JSON line for each contestant of each case, with its birth certificate.

    {"suite": "step", "case": "dpo-lora-...", "contestant": "trl", "status": "ok", "gpu": "NVIDIA H100 80GB HBM3",
     "method": "dpo", "adapter": "lora", "model": "Qwen2.5-0.5B", "workload": "lognormal",
     "step_ms_p50": ..., "tokens_per_s": ..., "peak_mem_mib": ..., "certificate": {"commit": ..., ...}}

Lines are only ever appended, each as soon as its case has ended, so that a run may be cut at any time; a later run in
the same file goes on with the cases that have no line of its commit, device and settings yet.
"""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from logratio.trainers.errors import UserError
from logratio.trainers.ground.provenance import commit, versions

STATUSES = {
    "ok": "measured",
    "oom": "out of memory, which is a result",
    "refused": "the contestant does not support the case, or is not installed",
    "failed": "an error, told under `error`",
}
RESULTS = ("ok", "oom")
"""The statuses that a later run need not try again."""


class Records:
    """A file of JSON lines that is only ever appended to. done: the newest line of each measurement that has ended."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_half_line(path)
        rows = [] if fresh else list(read(path))
        self.done = {identity(row): row for row in rows if row.get("status") in RESULTS}
        self.failed = {(row["suite"], row["case"]) for row in rows if row.get("status") == "failed"}
        self.begun = path.with_suffix(".begun")
        if self.begun.exists() and not fresh:  # a run was ended in the middle of it
            self.failed.add(tuple(json.loads(self.begun.read_text())))

    @contextlib.contextmanager
    def beginning(self, suite: str, case: str) -> Iterator[None]:
        """Inside, a case is under way, which a run that is killed leaves behind as one that failed."""
        self.begun.write_text(json.dumps([suite, case]))
        yield
        self.begun.unlink(missing_ok=True)

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether a line with the same identity, measured or out of memory, is already there."""
        return identity(row) in self.done

    def add(self, row: dict[str, Any]) -> None:
        """Append one line; it is on the disk when this returns."""
        if row["status"] not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {row['status']!r}")
        with self.path.open("a") as file:
            file.write(json.dumps(row, sort_keys=False, allow_nan=False) + "\n")
        if row["status"] in RESULTS:
            self.done[identity(row)] = row


def cut_half_line(path: Path) -> None:
    """Take away what a killed run left without a line break: the next line would be glued to it, and both be lost."""
    text = path.read_bytes() if path.exists() else b""
    if text and not text.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two lines the same measurement: case, settings, contestant, device, commit."""
    certificate = row["certificate"]
    settings = json.dumps(certificate["settings"], sort_keys=True)
    device = certificate.get("cpu") if row["gpu"] == "cpu" else row["gpu"]
    return row["suite"], row["case"], row["contestant"], device, certificate["commit"], settings


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, or of all *.jsonl in a folder, each with `source`: file name and line number.

    A last line that a killed run left half-written is passed over; any other that is no JSON raises UserError.
    """
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []:
        lines = file.read_text().split("\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):  # no line break after it: it was being written
                    continue
                raise UserError(f"{file}:{number} is not JSON, so take that line out: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{file}:{number} is no JSON object, so take that line out: {line[:40]}")
            yield row | {"source": f"{file.name}:{number}"}


def device_name(device: torch.device) -> str:
    """The name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def certificate(device: torch.device, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where a number comes from. settings: what decides it beyond the case's name (seed, dtype, repeats, ...)."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command(sys.argv),
        "device": device_name(device),
        "driver": driver(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions().items() if name != "python"},
        "settings": dict(settings),
    }


def command(argv: Sequence[str]) -> str:
    """The command without the folder of its results, which decides no number and names somebody's machine."""
    words = [Path(argv[0]).name, *argv[1:]]
    if "--results" in words:
        at = words.index("--results")
        del words[at : at + 2]
    return shlex.join(word for word in words if not word.startswith("--results="))


def driver(device: torch.device) -> str | None:
    """The version of the GPU's driver."""
    if device.type != "cuda":
        return None
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
