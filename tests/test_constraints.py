"""The tested set is complete, lies within the ranges, and can be had from any index."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# Whatever release of torch is taken asks for the one triton that goes with it, and bounds setuptools.
FOLLOW_TORCH = {"triton", "setuptools"}


def pinned() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {name.lower().replace("_", "-"): Version(version) for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)
    return pins


def taken(lines: list[str], extras: dict[str, list[str]]) -> Iterator[Requirement]:
    """What these lines ask for, those of the package's own extras in their place."""
    for wanted in map(Requirement, lines):
        if wanted.name == "logratio":
            yield from taken([line for extra in wanted.extras for line in extras[extra]], extras)
        else:
            yield wanted


def test_the_tested_set_names_what_make_install_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = pinned()
    lines = [*project["dependencies"], "logratio[reference,test]"]
    for wanted in taken(lines, project["optional-dependencies"]):
        if wanted.name not in FOLLOW_TORCH:
            assert wanted.specifier.contains(pins[wanted.name.lower()]), wanted


def test_no_version_is_one_index_s_own():
    """torch 2.13.0 is what other indexes call 2.13.0+cpu, and stands for both."""
    assert not any(version.local for version in pinned().values())
    assert not FOLLOW_TORCH & pinned().keys()
