"""What runs the checks elsewhere runs those of the Makefile."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()


def recipe_of(target):
    return (
        re.search(rf"^{target}:.*\n((?:\t.+\n)+)", MAKEFILE, re.MULTILINE)[1].replace("$(BIN)", ".venv/bin").split("\n")
    )


def test_the_hooks_before_a_commit_are_make_check():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    assert [hook["entry"] for hook in repo["hooks"]] == [line.strip() for line in recipe_of("check") if line]
    assert not any(hook["pass_filenames"] for hook in repo["hooks"])


def test_the_workflow_calls_make_test_on_the_oldest_and_the_newest_python():
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test"]
    assert "Python 3.11 to 3.13" in (ROOT / "constraints.txt").read_text()


def test_the_long_forms_are_run_every_week():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "long.yml").read_text())
    ((job,), triggers) = workflow["jobs"].values(), workflow[True]  # YAML's reading of "on"
    targets = ["test-long", "chaos", "test-oldest"]
    assert triggers["schedule"] and [s["run"] for s in job["steps"] if "run" in s] == [f"make {t}" for t in targets]
    assert all(recipe_of(target) for target in targets)
