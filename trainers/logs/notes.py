"""notes.jsonl: the sentences that a run has said, a JSON line each, with the step that they were said at.

The file is small and written anew with every sentence, beside its place and renamed, so that it is whole however a run
ends. One that goes on takes away what it will say again. A disk that takes no more costs no run: the next sentence, or
checkpoint, writes them all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError

NOTES = "notes.jsonl"
Kind = Literal["note", "alarm", "end"]
"""What is so; what may be wrong; why it ended before its time."""


class Notes:
    """Of a run in this folder. after: the step behind which it goes on; None: it begins, and the file with it."""

    def __init__(self, folder: Path, after: int | None = None) -> None:
        self.path = folder / NOTES
        self.problem: str | None = None  # why they wait
        self.lines: list[dict[str, Any]] = []
        if after is not None and self.path.exists():
            self.lines = [line for line in self._read() if line["step"] <= after and line["kind"] != "end"]
            self.write()

    def _read(self) -> list[dict[str, Any]]:
        """UserError where somebody has changed the file into something else."""
        try:
            lines = [json.loads(line) for line in self.path.read_text().splitlines()]
            return [{"step": int(line["step"]), "kind": str(line["kind"]), "text": line["text"]} for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} cannot be read as the notes of the run that goes on; put it back, or remove it"
            ) from error

    def add(self, step: int, kind: Kind, text: str) -> None:
        """Keep a sentence; one that is there already, as those with which a run begins where it goes on, is not kept
        again."""
        if all(line["text"] != text for line in self.lines):
            self.lines.append({"step": step, "kind": kind, "text": text})
            self.write()

    def write(self) -> None:
        """All of them, or leave the file as it was."""
        partial = self.path.with_name(f".{NOTES}")
        try:
            partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
            partial.replace(self.path)
            self.problem = None
        except OSError as error:
            partial.unlink(missing_ok=True)
            self.problem = error.strerror or str(error)

    def flush(self) -> None:
        """Raises UserError where they still wait."""
        if self.problem is not None:
            self.write()
        if self.problem is not None:
            raise UserError(f"{self.path} could not be written: {self.problem}")
