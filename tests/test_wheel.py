"""The wheel holds what the checkout holds: every module, and the entry points."""

import configparser
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("losses", "trainers", "reference", "benchmarks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, with what is installed: no network, and no build folder left behind."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "out"))
    for file in [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")] + [
        path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()
    ]:
        if "__pycache__" not in file.parts:
            target = source / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", str(out), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_every_module_is_in_the_wheel_and_nothing_else(wheel):
    """A nested folder that is missing from `packages` works in an editable install, and not from the wheel."""
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"logratio/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    page = {f"logratio/benchmarks/pages/{name}" for name in ("page.html.j2", "page.css", "page.js")}
    assert page <= set(names), "what a page is made of"
    assert {name.split("/")[0] for name in names} == {"logratio", f"logratio-{version()}.dist-info"}
    assert "logratio/__init__.py" not in names, "logratio is a namespace"


def test_entry_points_and_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
    entries = configparser.ConfigParser()
    entries.read_string(archive.read(name).decode())
    assert entries["console_scripts"]["logratio"] == "logratio.trainers.cli:main"
    assert entries["logratio.commands"]["verify"] == "logratio.benchmarks.verify:main"
    assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())


def test_the_wheel_imports_from_elsewhere(wheel, tmp_path):
    """Unpacked, and found before the checkout: every entry point's target can be imported from it."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import logratio.losses as losses, logratio.trainers.cli as cli\n"
        "print(losses.__file__); print(cli.__file__); print(sorted(losses.LOSSES)); print(callable(cli.main))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files, printed = done.stdout.splitlines()[:2], done.stdout.splitlines()[2:]
    assert all(file.startswith(str(tmp_path)) for file in files)
    assert "dpo" in printed[0] and printed[1] == "True"


def version():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
