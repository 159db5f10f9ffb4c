"""What `benchmarks/gpu.sh` runs, and runs again: with a Python that only writes down its arguments."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
FAKE = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$2" in
  pytest) echo "1 passed"; sleep "${TESTS_S:-0}"; exit "${TESTS:-0}";;
  *bench) exit "${BENCH:-0}";;
esac
"""


@pytest.fixture
def run(tmp_path):
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    calls = tmp_path / "calls"

    def run(seconds: int = 520, **environment: str) -> tuple[int, list[str]]:
        calls.write_text("")
        path = f"{fake.parent}:{os.environ['PATH']}"
        done = subprocess.run(
            [SCRIPT, tmp_path / "results", str(seconds)],
            env={**os.environ, "PATH": path, "CALLS": str(calls), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, [line.split()[1] for line in calls.read_text().splitlines()]

    return run


# which this file, that the script would take for one of them, must not say in one word
MARK = "mark" + ".gpu"
FILES = ["pytest"] * sum(MARK in file.read_text() for file in Path(__file__).parents[1].rglob("test_*.py"))
EVERYTHING = [*FILES, "logratio.benchmarks.bench", "logratio.benchmarks.report"]


@pytest.mark.parametrize("tests", ["0", "1"])
def test_tests_that_have_ended_are_not_run_again_and_are_not_forgotten(run, tests):
    assert run(TESTS=tests) == (int(tests), EVERYTHING)
    assert run(TESTS="0") == (int(tests), EVERYTHING[len(FILES) :])


def test_tests_that_there_was_no_time_for_are_run_the_next_time(run):
    assert run(10, TESTS_S="3") == (1, [*FILES[:2], *EVERYTHING[len(FILES) :]]), "the first ends, the second is stopped"
    assert run(10) == (0, [*FILES[1:], *EVERYTHING[len(FILES) :]])


@pytest.mark.parametrize(("code", "status"), [("1", 1), ("124", 0)])
def test_a_failure_is_told_the_end_of_the_time_is_none_and_the_report_is_made(run, code, status):
    assert run(BENCH=code) == (status, EVERYTHING)
