"""What `benchmarks/gpu.sh` runs, and runs again: with a Python that only writes down its arguments."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
# "passes" the first test of every file that is not deselected, as xdist prints it
FAKE = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$2" in
  pytest)
    for word in "$@"; do
      case "$word" in
        tests/*.py)
          name="$word::test_a[1 x]"
          if [[ "$*" != *"--deselect $name"* ]]; then echo "[gw1] [ 50%] ${VERDICT:-PASSED} $name "; fi
          sleep "${TESTS_S:-0}";;
      esac
    done
    exit "${TESTS:-0}";;
  *bench) exit "${BENCH:-0}";;
esac
"""
BENCH, REPORT = "logratio.benchmarks.bench", "logratio.benchmarks.report"
EVERYTHING = ["pytest", BENCH, BENCH, BENCH, BENCH, REPORT]


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
            env={**os.environ, "PATH": path, "CALLS": str(calls), "LOGRATIO_COMMIT": "c1", **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, calls.read_text().splitlines()

    return run


def names(calls):
    return [call.split()[1] for call in calls]


def files(calls):
    """The test files that were asked for, without those that are left out one by one."""
    asked = [re.sub(r"--deselect \S+ x\]", "", call) for call in calls if call.split()[1] == "pytest"]
    return [re.findall(r"tests/\S+\.py", call) for call in asked]


def test_everything_in_order(run):
    status, calls = run()
    assert status == 0 and names(calls) == EVERYTHING
    (asked,) = files(calls)
    # which this file, that the script would take for one of them, must not say in one word
    texts = {str(f.relative_to(ROOT)): f.read_text() for f in ROOT.glob("tests/**/test_*.py")}
    assert set(asked) == {name for name, text in texts.items() if "mark" + ".gpu" in text or "@" + "on_device" in text}
    assert [call.split()[2] for call in calls if call.split()[1] == BENCH] == ["head", "step", "rollout", "all"]


def test_tests_that_have_passed_are_left_out_the_next_time_until_the_commit_changes(run):
    _, first = run()
    status, again = run(TESTS="5")  # pytest's word for "none is left"
    assert status == 0 and files(again) == files(first)
    assert all(f"--deselect {file}::test_a[1 x]" in again[0] for file in files(first)[0])
    _, new = run(LOGRATIO_COMMIT="c2")
    assert "--deselect" in again[0] and "--deselect" not in first[0] and "--deselect" not in new[0]


def test_tests_that_failed_are_run_again_and_make_the_status(run):
    assert run(TESTS="1", VERDICT="FAILED")[0] == 1
    status, calls = run()
    assert status == 0 and "--deselect" not in calls[0]


def test_tests_that_there_was_no_time_for_are_no_failure(run):
    status, calls = run(4, TESTS_S="1")  # of the first tests' 1 s
    assert status == 0 and names(calls) == EVERYTHING


@pytest.mark.parametrize(("code", "status"), [("1", 1), ("124", 0)])
def test_a_failure_is_told_the_end_of_the_time_is_none_and_the_report_is_made(run, code, status):
    found, calls = run(BENCH=code)
    assert found == status and names(calls) == EVERYTHING
