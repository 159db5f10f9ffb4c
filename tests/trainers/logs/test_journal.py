"""The log's chain, and a disk that takes no more for a while."""

import hashlib
import json
import os

import pytest

from logratio.trainers.errors import UserError
from logratio.trainers.logs import journal
from logratio.trainers.logs.journal import Journal, chained, read_chain


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path, count, **more):
    log = Journal(path)
    for step in range(1, count + 1):
        log.append({"step": step, "loss": 1 / step, **more})
    log.close()
    return log


def test_a_line_has_a_hash_over_the_one_before_and_its_figures(tmp_path):
    written(tmp_path / "log", 2, step_ms=5.0)
    first, second = rows_of(tmp_path / "log")
    expected = ""
    for row, text in ((first, '{"step": 1, "loss": 1.0}'), (second, '{"step": 2, "loss": 0.5}')):
        expected = hashlib.sha256((expected + text).encode()).hexdigest()[:32]
        assert row["hash"] == expected


def test_the_last_line_tells_two_runs_apart_but_not_two_machines(tmp_path):
    ends = [written(tmp_path / str(i), 3, **more).hash for i, more in enumerate([{"step_ms": 1.0}, {"step_ms": 2.0}])]
    assert ends[0] == ends[1] != written(tmp_path / "other", 3, kl=0.1).hash


def test_it_goes_on_behind_a_line_and_cuts_off_what_follows(tmp_path):
    path = tmp_path / "log"
    whole = written(path, 5)
    third = rows_of(path)[2]["hash"]
    path.write_text(path.read_text() + '{"step": 6, "lo')  # the process was killed in it
    log = Journal(path, (3, third))
    assert log.last["step"] == 3 and len(rows_of(path)) == 3
    for step in (4, 5):
        log.append({"step": step, "loss": 1 / step})
    log.close()
    assert log.hash == whole.hash and [row["step"] for row in rows_of(path)] == [1, 2, 3, 4, 5]


def test_a_log_of_another_run_is_refused(tmp_path):
    path = tmp_path / "log"
    written(path, 3)
    known = rows_of(path)[1]["hash"]
    path.write_text(path.read_text().replace('"step": 1, "loss": 1.0', '"step": 1, "loss": 2.0'))
    before = path.read_text()
    with pytest.raises(UserError, match="is not the log of the run that goes on: up to step 2 it has other lines"):
        Journal(path, (2, known))
    assert path.read_text() == before
    with pytest.raises(UserError, match="cannot be read: No such file .*; put the metrics.jsonl of .* beside the"):
        Journal(tmp_path / "none", (2, known))


def test_the_chain_ends_with_the_first_line_that_does_not_hold(tmp_path):
    path = tmp_path / "log"
    written(path, 4)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[3]]))
    assert [row["step"] for row, _ in read_chain(path)] == [1, 2]
    path.write_text("".join(lines[:2]) + "{}\n")
    assert [end for _, end in read_chain(path)] == [len(lines[0]), len(lines[0] + lines[1])]


def test_lines_wait_for_a_disk_that_takes_no_more(tmp_path, monkeypatch):
    """Half of a line that was written before the disk was full is taken back."""
    path, log = tmp_path / "log", Journal(tmp_path / "log")
    log.append({"step": 1})
    full = True

    def pwrite(descriptor, data, at, whole=os.pwrite):
        if full and len(data) <= 10:
            raise OSError(28, "No space left on device")
        return whole(descriptor, data[:10] if full else data, at)

    monkeypatch.setattr(journal.os, "pwrite", pwrite)
    log.append({"step": 2})
    assert log.problem == "No space left on device" and len(rows_of(path)) == 1
    with pytest.raises(UserError, match="log could not be written: No space left on device"):
        log.flush()
    full = False
    log.append({"step": 3})
    log.flush()
    log.close()
    assert log.problem is None and [row["step"] for row, _ in read_chain(path)] == [1, 2, 3]


def test_figures_are_hashed_as_they_are_read_back():
    """A float is written so that it is read back to the bit."""
    row = {"step": 1, "loss": 0.1 + 0.2, "kl": float("nan")}
    assert chained("x", row) == chained("x", json.loads(json.dumps(row)))
