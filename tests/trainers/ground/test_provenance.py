"""By which code something was computed."""

import importlib.metadata
import subprocess
from pathlib import Path

import pytest

from logratio.trainers.ground import provenance
from logratio.trainers.ground.provenance import commit, installed, sources_hash, versions

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def nobody_tells(monkeypatch):
    monkeypatch.delenv("LOGRATIO_COMMIT", raising=False)


def git(where: Path, *words: str) -> str:
    # nobody's settings but its own
    config = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "core.hooksPath="]
    command = ["git", "-C", str(where), *config, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_root_holds_all_four_packages():
    assert provenance.ROOT == ROOT and all(
        (provenance.ROOT / name / "__init__.py").exists() for name in ("losses", "trainers", "reference", "benchmarks")
    )


def test_a_commit_is_dirty_where_a_tracked_file_differs(tmp_path):
    """Results, and the page and plots that are made of them, may change; files that nobody tracks do not count."""
    here = tmp_path / "benchmarks"
    results = [here / "results/step.jsonl", here / "README.md", here / "plots/a.png"]
    others = [tmp_path / "trainers/ground/provenance.py", here / "reporting/records.py", tmp_path / "losses/dpo.py"]
    others += [tmp_path / "README.md", tmp_path / "results/x"]
    for file in [*results, *others]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    head = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert commit(tmp_path) == head and len(head) == 12
    for file in [*results, tmp_path / "new.py"]:
        file.write_text("2\n")
    assert commit(tmp_path) == head
    for file in others:
        file.write_text("2\n")
        assert commit(tmp_path) == head + "-dirty", file
        file.write_text("1\n")
        assert commit(tmp_path) == head


def test_a_wheel_has_a_version_in_place_of_a_commit(tmp_path, monkeypatch):
    """In no repository; and in somebody else's, which does not track it."""
    (tmp_path / "trainers" / "ground").mkdir(parents=True)
    (tmp_path / "trainers" / "ground" / "provenance.py").write_text("")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path).startswith("logratio ")
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "theirs")
    assert commit(tmp_path).startswith("logratio ")


def test_sources_without_their_history_are_told_their_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGRATIO_COMMIT", "abc")
    assert commit(tmp_path) == "abc"


def test_two_wheels_of_one_version_are_told_apart_by_their_sources(tmp_path):
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "dpo.py").write_text("beta = 0.1")
    first = sources_hash(tmp_path)
    (tmp_path / "results.jsonl").write_text("{}")
    (tmp_path / "other.py").write_text("")
    assert sources_hash(tmp_path) == first and len(first) == 12
    (tmp_path / "losses" / "dpo.py").write_text("beta = 0.2")
    assert sources_hash(tmp_path) != first
    (tmp_path / "losses" / "dpo.py").write_text("beta = 0.1")
    (tmp_path / "losses" / "dpo.py").rename(tmp_path / "losses" / "kto.py")
    assert sources_hash(tmp_path) != first


def test_versions_are_of_what_is_installed():
    assert versions()["torch"] == importlib.metadata.version("torch") and "python" in versions()
    assert installed("no-such-package") is None and "no-such-package" not in versions()
