"""completions.parquet: whole at every moment, every step once, and two of them on the screen."""

import errno
import json
import os

import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len

from logratio.trainers.errors import UserError
from logratio.trainers.logs import completions
from logratio.trainers.logs.completions import CompletionParts
from logratio.trainers.logs.runlog import RunLog
from logratio.trainers.logs.samples import as_turns, best_and_worst


def rows_of(step, *rewards, **more):
    return [
        {
            "step": step,
            "row": i // 2,
            "prompt": f"of row {i // 2}",
            "completion": f"{step}-{i}",
            "rewards/one": reward,
            "reward": reward,
            "advantage": 0.5,
            "completion_length": 3,
            "finish_reason": "stop",
            **more,
        }
        for i, reward in enumerate(rewards)
    ]


def read(folder):
    return pq.read_table(folder / "completions.parquet").to_pylist()


def test_the_folder_reads_as_one_table_after_every_step(tmp_path):
    parts, wanted = CompletionParts(tmp_path), []
    for step in (1, 2, 10):
        rows = rows_of(step, 1.0, None)
        parts.add(step, rows)
        wanted += rows
        assert read(tmp_path) == wanted
    assert [p.name for p in parts.parts()] == ["step-000001.parquet", "step-000002.parquet", "step-000010.parquet"]


def test_a_column_that_comes_later_is_there_for_all_and_empty_before(tmp_path):
    """Readers take the columns of the first part for those of all."""
    CompletionParts(tmp_path).add(1, rows_of(1, None, None))
    CompletionParts(tmp_path, after=1).add(2, rows_of(2, 1.0, 0.0, verdict="good"))
    parts = CompletionParts(tmp_path, after=2)
    parts.add(3, rows_of(3, 1.0))
    parts.add(4, rows_of(4, 1.0, cost="2"))
    assert [row.get("verdict", "no column") for row in read(tmp_path)] == [None, None, "good", "good", None, None]
    assert [row["cost"] for row in read(tmp_path)] == [None] * 5 + ["2"]


def test_a_run_that_goes_on_drops_what_it_samples_again_and_what_is_not_whole(tmp_path):
    parts = CompletionParts(tmp_path)
    for step in (1, 3, 5):
        parts.add(step, rows_of(step, 1.0))
    (parts.path / ".step-000003.parquet.partial").write_bytes(b"PAR1")
    parts = CompletionParts(tmp_path, after=4)
    assert sorted(os.listdir(parts.path)) == ["step-000001.parquet", "step-000003.parquet"]
    parts.add(5, rows_of(5, 0.25))
    assert [(row["step"], row["reward"]) for row in read(tmp_path)] == [(1, 1.0), (3, 1.0), (5, 0.25)]


def test_a_disk_that_takes_no_more_is_said_once_and_parts_wait(tmp_path, monkeypatch, capsys):
    """The second of three parts and what comes behind it; the file that was cut off is not there."""
    real = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunLog(str(tmp_path), {}, total_steps=9) as log:
        log.completions(rows_of(1, 1.0), 0)
        monkeypatch.setattr(completions.os, "fsync", full)
        log.completions(rows_of(2, 1.0), 0)
        log.completions(rows_of(3, 1.0), 0)
        assert [row["step"] for row in read(tmp_path)] == [1]
        assert os.listdir(log.parts.path) == ["step-000001.parquet"]
        with pytest.raises(UserError, match="completions.parquet could not be written: No space left on device"):
            log.parts.flush()
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("completions.parquet cannot be written (No space left on device): completions wait") == 1
        monkeypatch.setattr(completions.os, "fsync", real)
        log.completions(rows_of(4, 1.0), 0)
        log.flush()
    assert [row["step"] for row in read(tmp_path)] == [1, 2, 3, 4]


def test_another_runs_completions_are_moved_aside(tmp_path):
    for number in (1.0, 2.0):
        with RunLog(str(tmp_path), {}, total_steps=1, quiet=True) as log:
            log.completions(rows_of(1, number), 0)
    assert [row["reward"] for row in read(tmp_path)] == [2.0]
    assert [row["reward"] for row in pq.read_table(tmp_path / "completions.1.parquet").to_pylist()] == [1.0]


def test_best_and_worst_of_a_prompt_are_shown_and_prompts_take_turns():
    rows = rows_of(4, 0.0, 1.0, None, 0.25)
    rows[3]["completion"], rows[3]["finish_reason"] = "a\nb\x1b[31m", "length"
    assert best_and_worst(rows, 80) == [
        "step 4, row 0: of row 0",
        "  reward 1: 4-1",
        "  reward 0: 4-0",
    ]
    for row in rows:
        row.update({"step": 5, "rewards/two": -0.5})
    assert best_and_worst(rows, 80) == [
        "step 5, row 1: of row 1",
        "  reward 0.25 (one 0.25, two -0.5) (cut): a\\nb\\x1b[31m",
        "  reward none (one none, two -0.5): 4-2",
    ]


def test_conversations_are_shown_as_turns():
    rows = rows_of(4, 0.0, 1.0)
    for row in rows:
        row["prompt"] = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}])
    rows[1]["completion"] = json.dumps([{"role": "assistant", "content": "4", "tool_calls": []}])
    assert best_and_worst(rows, 80) == [
        "step 4, row 0: system: Be brief.\\nuser: 2+2?",
        "  reward 1: assistant: 4",
        "  reward 0: 4-0",
    ]
    for text in ("[{", '[{"role": "user"}]', "[{}] and more", '{"role": "user", "content": "x"}', "", "plain"):
        assert as_turns(text) == text


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_what_is_shown_is_cut_to_the_width_a_prompt_at_its_beginning(width):
    rows = rows_of(2, 1.0, 0.0)
    for row in rows:
        row.update(prompt="x" * 300 + " last words", completion="first words " + "漢" * 300)
    lines = best_and_worst(rows, width)
    assert all(cell_len(line) <= width for line in lines) and len(lines) == 3
    if width >= 60:
        assert lines[0].endswith("last words") and "..." in lines[0] and cell_len(lines[0]) >= width - 1
        assert "first words 漢" in lines[1] and lines[1].endswith("...") and cell_len(lines[1]) >= width - 1


def test_they_are_shown_every_so_many_steps(tmp_path, capsys):
    """Of a set of rollouts for two steps each, no later than it is sampled; a run that goes on counts from there."""
    with RunLog(str(tmp_path), {}, total_steps=20) as log:
        for step in range(1, 20, 2):
            log.completions(rows_of(step, 1.0), 4)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split(",")[0] for line in shown] == ["step 5", "step 9", "step 13", "step 17"]
