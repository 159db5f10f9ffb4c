"""metrics.jsonl and run_config.json: complete at every moment, and an earlier run's are kept."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from logratio.trainers.errors import UserError
from logratio.trainers.logs.runlog import RunLog, keep_earlier, peak_mem_mib


def test_every_step_is_a_line_that_can_be_read_at_once(tmp_path, capsys):
    with RunLog(str(tmp_path / "a" / "b"), {"method": "dpo", "loss": {"beta": 0.1}}, total_steps=3) as log:
        for step in (1, 2, 3):
            log.step({"step": step, "loss": 0.5 / step, "extra": 1e-7})
            lines = (tmp_path / "a" / "b" / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines][-1] == {
                "step": step,
                "loss": 0.5 / step,
                "extra": 1e-7,
                "hash": log.journal.hash,
            }
            assert len(lines) == step
    assert json.loads((tmp_path / "a" / "b" / "run_config.json").read_text()) == {
        "method": "dpo",
        "loss": {"beta": 0.1},
    }
    shown = capsys.readouterr().out
    assert "step 1/3  loss 0.5" in shown and "step 3/3" in shown and "extra" not in shown


def test_a_full_disk_leaves_the_settings_of_the_run_that_goes_on(tmp_path, monkeypatch):
    with RunLog(str(tmp_path), {"method": "dpo"}, total_steps=1) as log:
        log.step({"step": 1})
    before = (tmp_path / "run_config.json").read_bytes()

    def full(path, text, **_):
        path.write_bytes(text[:3].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    message = "run_config.json could not be written: No space left on device; make room, or choose another folder$"
    with pytest.raises(UserError, match=message):
        RunLog(str(tmp_path), {"method": "kto"}, total_steps=1, after=(1, log.journal.hash))
    assert (tmp_path / "run_config.json").read_bytes() == before
    assert [path.name for path in tmp_path.glob("*run_config*")] == ["run_config.json"]


def test_a_long_run_shows_about_twenty_lines(tmp_path, capsys):
    with RunLog(str(tmp_path), {}, total_steps=400) as log:
        for step in range(1, 401):
            log.step({"step": step, "loss": 1.0})
    assert 20 <= len(capsys.readouterr().out.splitlines()) <= 22
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 400


@pytest.mark.parametrize(("main", "quiet"), [(False, False), (True, True)])
def test_other_processes_write_nothing_and_quiet_ones_show_nothing(tmp_path, capsys, main, quiet):
    with RunLog(str(tmp_path / "run"), {}, total_steps=1, main=main, quiet=quiet) as log:
        log.say("hello")
        log.step({"step": 1, "loss": 1.0})
    assert capsys.readouterr().out == ""
    assert (tmp_path / "run").exists() == main


def test_a_second_run_moves_the_first_ones_log_aside(tmp_path):
    for number in (1, 2, 3):
        with RunLog(str(tmp_path), {"run": number}, total_steps=1, quiet=True) as log:
            log.step({"step": number})
    files = {p.name: json.loads(p.read_text()) for p in tmp_path.iterdir()}
    for name in ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"):
        del files[name]["hash"]
    assert files == {
        "metrics.1.jsonl": {"step": 1},
        "metrics.2.jsonl": {"step": 2},
        "metrics.jsonl": {"step": 3},
        "run_config.1.json": {"run": 1},
        "run_config.2.json": {"run": 2},
        "run_config.json": {"run": 3},
    }


def test_nothing_to_keep_is_fine(tmp_path):
    keep_earlier(tmp_path / "metrics.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_the_log_is_closed_when_a_run_fails(tmp_path):
    with pytest.raises(KeyError), RunLog(str(tmp_path), {}, total_steps=1, quiet=True) as log:
        log.step({"step": 1})
        raise KeyError("loss")
    with pytest.raises(OSError):
        os.fstat(log.journal.file)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_kernels_high_water_mark_in_mib():
    status = Path("/proc/self/status").read_text()
    in_kib = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    assert peak_mem_mib(torch.device("cpu")) == pytest.approx(in_kib / 1024, rel=0.02)
