"""The projects whose functions are held to our laws: their versions, and how their modules are found.

verl and OpenRLHF are made for clusters, and torchtune for a quantizer: what they install would change the versions
under test. Installed without it (`pip install --no-deps`), the file with the functions is imported alone, without the
`__init__` of the packages around it, and what else it imports is a stand-in that fails when it is used.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Collection, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

PROJECTS = {
    "TRL": ("trl", "1.16.0"),
    "Liger": ("liger-kernel", "0.8.5"),
    "verl": ("verl", "0.9.1"),
    "OpenRLHF": ("openrlhf", "0.11.2"),
    "torchtune": ("torchtune", "0.6.1"),
}
"""project -> its distribution, and the version of which the reasons speak."""
ALONE = ("verl", "OpenRLHF", "torchtune")
INSTALL = "pip install --no-deps " + " ".join("==".join(PROJECTS[project]) for project in ALONE)


class StandIn(types.ModuleType):
    """A module that is not there; its names are empty classes, which annotations may hold."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__module__": self.__name__})


class _Finder:
    """Finds the stand-ins before what is installed, so that it does not matter what is."""

    def __init__(self, absent: Collection[str]) -> None:
        self.absent = absent

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        found = any(f"{name}.".startswith(f"{absent}.") for absent in self.absent)
        return ModuleSpec(name, self, is_package=True) if found else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


@contextlib.contextmanager
def standing_in(absent: Collection[str]) -> Iterator[None]:
    """Stand in for these modules and what is under them until the end."""
    before, finder = {*sys.modules}, _Finder(absent)
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in {*sys.modules} - before:
            if isinstance(sys.modules[name], StandIn):
                del sys.modules[name]


def module_of(name: str, absent: Collection[str] = ()) -> Any:
    """A module, imported without the `__init__` of its packages. absent: what of its imports is a stand-in."""
    package, *rest = name.split(".")
    spec = importlib.util.find_spec(package) if package not in sys.modules else sys.modules[package].__spec__
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: {INSTALL}")
    here = Path(next(iter(spec.submodule_search_locations)))
    for i in range(len(rest)):
        parent = ".".join([package, *rest[:i]])
        if parent not in sys.modules:
            bare = types.ModuleType(parent)
            bare.__path__, bare.__spec__ = [str(here.joinpath(*rest[:i]))], spec
            sys.modules[parent] = bare
    with standing_in(absent):
        return importlib.import_module(name)
