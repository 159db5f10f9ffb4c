"""Records: what counts as done, what a killed run may leave behind, and when a commit is told to be dirty."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from logratio.benchmarks.reporting import records
from logratio.benchmarks.reporting.records import Records, certificate, identity, read
from logratio.trainers.errors import UserError
from logratio.trainers.ground.provenance import commit


def row(**changes: Any) -> dict[str, Any]:
    """A record; `commit`, `settings`, `cpu` and `date` go to its certificate."""
    own = {"commit": "abc", "settings": {"seed": 0, "repeats": 5}, "cpu": "A", "date": "2026-01-01T00:00:00+00:00"}
    own |= {key: changes.pop(key) for key in list(changes) if key in own}
    fixed = {"suite": "step", "case": "dpo-lora", "contestant": "trl", "status": "ok", "gpu": "H100"}
    return fixed | changes | {"certificate": own}


def test_lines_are_appended_and_read_with_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "results" / "step.jsonl"
    Records(file).add(row(step_ms_p50=1.5))
    before = file.read_text()
    Records(file).add(row(contestant="logratio"))
    assert file.read_text().startswith(before), "what is there stays as it is"
    Records(tmp_path / "results" / "head.jsonl").add(row(suite="head"))
    found = list(read(tmp_path / "results"))
    assert [r["source"] for r in found] == ["head.jsonl:1", "step.jsonl:1", "step.jsonl:2"]
    assert found[1] == row(step_ms_p50=1.5) | {"source": "step.jsonl:1"}
    assert list(read(tmp_path / "nowhere")) == list(read(tmp_path / "no.jsonl")) == []


@pytest.mark.parametrize("other", [
    {"suite": "scale"}, {"case": "dpo-full"}, {"contestant": "logratio"}, {"gpu": "H200"}, {"commit": "abd"},
    {"settings": {"seed": 1, "repeats": 5}},
])  # fmt: skip
def test_another_measurement_is_not_done(tmp_path: Path, other: dict[str, Any]) -> None:
    file = tmp_path / "step.jsonl"
    Records(file).add(row())
    again = Records(file)
    assert again.has(row(date="2027-01-01T00:00:00+00:00", settings={"repeats": 5, "seed": 0}, step_ms_p50=2.0))
    assert not again.has(row(**other))


def test_another_processor_is_another_device_where_it_is_what_is_measured() -> None:
    assert identity(row(gpu="cpu", cpu="A")) != identity(row(gpu="cpu", cpu="B"))
    assert identity(row(cpu="A")) == identity(row(cpu="B"))


@pytest.mark.parametrize("status, done", [("ok", True), ("oom", True), ("refused", False), ("failed", False)])
def test_what_is_tried_again(tmp_path: Path, status: str, done: bool) -> None:
    records = Records(tmp_path / "step.jsonl")
    assert not records.has(row())
    records.add(row(status=status))
    assert records.has(row()) is done
    assert Records(records.path).has(row()) is done
    assert not Records(records.path, fresh=True).has(row())


def test_an_unknown_status_and_not_a_number_are_refused(tmp_path: Path) -> None:
    records = Records(tmp_path / "step.jsonl")
    with pytest.raises(ValueError, match="status must be one of ok, oom, refused, failed, got 'fine'"):
        records.add(row(status="fine"))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            records.add(row(step_ms_p50=bad))
    assert list(read(records.path)) == [] and not records.has(row())


def test_a_half_written_last_line_is_passed_over_and_the_next_run_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "step.jsonl"
    Records(file).add(row())
    whole = file.read_text()
    file.write_text(whole + whole[:60])
    assert [r["source"] for r in read(file)] == ["step.jsonl:1"]
    again = Records(file)
    again.add(row(contestant="logratio"))
    assert [r["contestant"] for r in read(file)] == ["trl", "logratio"]
    file.write_text(whole[:60])
    Records(file)
    assert file.read_text() == ""


@pytest.mark.parametrize("bad", ['{"suite": "st', "[1, 2]", "3", "null"])
def test_any_other_malformed_line_is_named(tmp_path: Path, bad: str) -> None:
    file = tmp_path / "step.jsonl"
    for after in (json.dumps(row()) + "\n", ""):
        file.write_text(json.dumps(row()) + "\n\n" + bad + "\n" + after)
        with pytest.raises(UserError, match=r"step\.jsonl:3 is no.*take that line out"):
            list(read(file))


def test_a_certificate_says_where_a_number_is_from() -> None:
    found = certificate(torch.device("cpu"), {"seed": 3})
    assert found["device"] == "cpu" and found["driver"] is None and found["cuda"] is None and found["cpu"]
    assert found["settings"] == {"seed": 3} and found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["date"].endswith("+00:00") and found["commit"] == commit()
    json.dumps(found, allow_nan=False)


def test_a_command_is_told_without_the_folder_of_its_results():
    words = ["/home/me/bin/logratio", "bench", "step", "--results", "/home/me/out", "--only", "dpo x"]
    assert records.command(words) == "logratio bench step --only 'dpo x'"
    assert records.command(["bench.py", "--results=/home/me/out", "step"]) == "bench.py step"
    assert records.command(["bench.py"]) == "bench.py"
