"""What a user names on the command line: objects of their own as `module:name`, and models."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError


def import_object(spec: str, option: str) -> Any:
    """What `module:name` names; modules are looked for in the working directory too, as `python -m` does.

    option: what the user gave `spec` to, for messages. Raises UserError where there is no such module or name; an
    error inside the module is the user's to see, and passes as it is.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise UserError(f"{option}={spec!r} must be written as module:name")
    if module_name.endswith(".py"):
        file = Path(module_name)
        raise UserError(
            f"{option}={spec!r} must name a module, not its file: {file.stem}:{name}, with PYTHONPATH={file.parent} "
            "where that is another folder than this"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A missing import inside the module is a fault of its own.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"{option}={spec!r}: there is no module {error.name!r} here, on the PYTHONPATH or installed"
        ) from None
    if not hasattr(module, name):
        raise UserError(f"{option}={spec!r}: the module {module_name!r} ({module.__file__}) has no {name!r}")
    return getattr(module, name)


def names_a_model(name: str) -> bool:
    """Whether a name can only be that of a model: a folder, or one on the Hub."""
    return "/" in name or Path(name).is_dir()
