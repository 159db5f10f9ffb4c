"""The tested set is complete, lies within the ranges, and can be had from any index."""

import tomllib
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


def test_the_tested_set_names_what_make_install_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = pinned()
    for line in [*project["dependencies"], *extras["reference"], *extras["test"]]:
        wanted = Requirement(line)
        if wanted.name not in FOLLOW_TORCH:
            assert wanted.specifier.contains(pins[wanted.name.lower()]), line


def test_no_version_is_one_index_s_own():
    """torch 2.13.0 is what other indexes call 2.13.0+cpu, and stands for both."""
    assert not any(version.local for version in pinned().values())
    assert not FOLLOW_TORCH & pinned().keys()
