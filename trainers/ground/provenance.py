"""By which code something was computed: the project's commit, and the versions of the packages under it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository, or where its packages are installed."""
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "trl",
    "liger-kernel",
    "triton",
    "logratio",
)
# They are written while a suite of benchmarks runs, and what `logratio report` makes of them decides no number.
RESULTS = (":!benchmarks/results", ":!benchmarks/README.md", ":!benchmarks/plots")


def versions() -> dict[str, str]:
    """Of Python and those of `PACKAGES` that are installed."""
    found = {name: version for name in PACKAGES if (version := installed(name))}
    return {"python": platform.python_version(), **found}


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(root: Path = ROOT) -> str:
    """The project's commit, "-dirty" behind it where files differ from it; else the version of the installed wheel,
    and a hash of its sources, for two wheels of one version may compute different things. `LOGRATIO_COMMIT` tells it
    where the sources have come without their history."""
    if told := os.environ.get("LOGRATIO_COMMIT"):
        return told

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if not git("ls-files", f"trainers/ground/{Path(__file__).name}"):  # a wheel inside somebody else's repository
            raise FileNotFoundError
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *RESULTS)
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"logratio {installed('logratio')}, sources {sources_hash(root)}"


def sources_hash(root: Path) -> str:
    """Of the names and texts of the four packages' Python files."""
    found = hashlib.sha256()
    for package in ("benchmarks", "losses", "reference", "trainers"):
        for file in sorted((root / package).rglob("*.py")):
            found.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:12]
