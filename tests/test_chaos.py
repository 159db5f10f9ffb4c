"""Eight random kills, of which most meet rollouts; `make chaos` does two hundred, of every method."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("chaos.py")


def test_runs_that_are_killed_and_gone_on_with_end_with_the_same_bits():
    cases = ["dpo", "grpo"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "8", "--steps", "3", "--only", *cases],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    found = re.fullmatch(r"(\d+) kills \((\d+) in a step, (\d+) in a rollout, (\d+) in a save\): 0 bits differ", last)
    assert found, done.stdout
    assert int(found[1]) >= 8 and all(int(n) > 0 for n in found.groups()), last
