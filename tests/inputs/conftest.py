"""What a user types, in the process: the status, what was said, and what was left behind."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from logratio.trainers import cli

ROW = {"prompt": "1+1=", "completion": "2", "chosen": "2", "rejected": "3", "answer": "2", "label": True}
MODEL_FILES = ("*.safetensors", "*.bin", "adapter_config.json")


@dataclass
class Said:
    """status: of the process. errors: lines on standard error, warnings of libraries apart."""

    status: int
    errors: list[str]
    output: str


Run = Callable[[str], Said]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("train dpo --beta 1") in a folder of its own with four good rows of every kind in rows.jsonl."""
    monkeypatch.chdir(tmp_path)
    rows = [{**ROW, "label": bool(i % 2), "prompt": f"{i}+1=", "chosen": str(i + 1)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def main(words: str) -> Said:
        capsys.readouterr()
        try:
            status = cli.main(shlex.split(words))
        except SystemExit as stopped:  # options that do not parse, as argparse leaves
            status = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return Said(status, [line for line in err.splitlines() if line.strip()], out)

    return main


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., str]:
    """refused(words, *fragments): status 1 and one sentence that holds the fragments; no model was written."""

    def check(words: str, *fragments: str) -> str:
        before = {path for pattern in MODEL_FILES for path in tmp_path.rglob(pattern)}
        said = run(words)
        assert said.status == 1, said
        ours = [line for line in said.errors if line.startswith("logratio: ")]
        assert len(ours) == 1 and said.errors[-1] == ours[0], said.errors
        assert not any("Traceback" in line for line in said.errors)
        for fragment in fragments:
            assert fragment in ours[0], ours[0]
        assert {path for pattern in MODEL_FILES for path in tmp_path.rglob(pattern)} == before, "a model was written"
        return ours[0]

    return check
