"""notes.jsonl: what a run says is kept with its step, once, however often it goes on."""

import json
import os
from pathlib import Path

import pytest

from logratio.trainers.errors import UserError
from logratio.trainers.logs.notes import Notes
from logratio.trainers.logs.runlog import RunLog

from .._runs import LATEST, back_to, notes, train


def lines(folder):
    return [json.loads(line) for line in Path(folder, "notes.jsonl").read_text().splitlines()]


def test_a_run_that_goes_on_says_again_what_came_after_its_checkpoint(tmp_path):
    said = Notes(tmp_path)
    said.add(0, "note", "of the beginning")
    said.add(3, "alarm", "three")
    said.add(4, "alarm", "four")
    said.add(4, "end", "stopped")
    again = Notes(tmp_path, after=3)
    assert [line["text"] for line in lines(tmp_path)] == ["of the beginning", "three"]
    again.add(3, "note", "of the beginning")  # as where it goes on
    again.add(4, "alarm", "four")
    assert lines(tmp_path) == [
        {"step": 0, "kind": "note", "text": "of the beginning"},
        {"step": 3, "kind": "alarm", "text": "three"},
        {"step": 4, "kind": "alarm", "text": "four"},
    ]


def test_what_ended_a_run_at_its_last_checkpoint_is_no_end_once_it_goes_on(tmp_path):
    Notes(tmp_path).add(3, "end", "stopped after step 3")
    Notes(tmp_path, after=3)
    assert lines(tmp_path) == []


@pytest.mark.parametrize("text", ["[", "3\n", '{"step": 1}\n', '{"step": "x", "kind": "note", "text": ""}\n'])
def test_a_file_that_is_no_notes_is_refused_and_left(tmp_path, text):
    (tmp_path / "notes.jsonl").write_text(text)
    with pytest.raises(UserError, match="cannot be read as the notes of the run that goes on; put it back, or remove"):
        Notes(tmp_path, after=3)
    assert (tmp_path / "notes.jsonl").read_text() == text


def test_a_disk_that_takes_none_costs_no_run(tmp_path, monkeypatch):
    said = Notes(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
        said.add(1, "alarm", "one")
        with pytest.raises(UserError, match="notes.jsonl could not be written: No space left on device"):
            said.flush()
    assert list(tmp_path.iterdir()) == []
    said.flush()
    assert [line["text"] for line in lines(tmp_path)] == ["one"]


@pytest.mark.parametrize(
    "error, text", [(UserError("bad row"), "bad row"), (ValueError("odd\nmore"), "ValueError: odd")]
)
def test_why_a_run_ended_is_kept(tmp_path, error, text):
    with pytest.raises(type(error)), RunLog(str(tmp_path), {}, total_steps=9, quiet=True) as log:
        log.say("not kept")
        log.note("begins")
        log.at = 4
        log.alarm("looks odd")
        raise error
    assert [tuple(line.values()) for line in lines(tmp_path)] == [
        (0, "note", "begins"),
        (4, "alarm", "looks odd"),
        (4, "end", text),
    ]


def test_other_processes_keep_none(tmp_path):
    with RunLog(str(tmp_path / "run"), {}, total_steps=9, main=False) as log:
        log.note("begins")
        log.alarm("odd")
    assert not (tmp_path / "run").exists()


ZERO = "up to step 5, for 5 steps on end, the gradient is exactly 0"


@pytest.mark.usefixtures("workspace")
def test_a_runs_alarms_are_kept_once_with_their_step():
    """A beta of 1e-30 makes every gradient exactly 0 in float32."""
    words = ["--lora_r", "2", "--beta", "1e-30", "--save_steps", "4"]
    train("dpo", *words)
    said = notes("out", "alarm")
    assert [step for step, text in said if text.startswith(ZERO)] == [5], said
    assert any("2 pairs with identical chosen and rejected" in text for step, text in notes("out", "note") if step == 0)
    back_to(4)
    train("dpo", *words, *LATEST)
    assert notes("out", "alarm") == said
    assert len({text for _, text in notes("out")}) == len(notes("out"))
    train("dpo", *words, "--resume_from_checkpoint", "out/checkpoint-4", output="elsewhere")
    assert notes("elsewhere", "alarm") == said
