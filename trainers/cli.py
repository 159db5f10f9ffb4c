"""The command line: `logratio train METHOD ...`, and the sub-commands that other packages enter.

Libraries that take seconds to import are imported where they are used, so that `logratio --help` answers at once.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from .errors import Stopped, UserError, printable
from .ground.signals import STATUS
from .logs.streams import Lasting, lasting_streams
from .options import TRAIN_HELP, parse_train

COMMANDS = "logratio.commands"
PLANNERS = "logratio.planners"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `logratio`; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, TextIOWrapper):  # as stderr is: what its encoding lacks is written out
        sys.stdout.reconfigure(errors="backslashreplace")
    # A run goes on when nobody reads what it prints any more; a command that only prints ends then.
    with lasting_streams() if argv[:1] == ["train"] else contextlib.nullcontext():
        try:
            status = dispatch(argv)
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
        except BrokenPipeError:
            Lasting(sys.stdout).give_up()
            return 141  # as where SIGPIPE ends a process
        except UserError as error:
            sys.stderr.write(printable(f"logratio: {error}\n"))  # in one piece: other processes write too
            return 1
        except Stopped as stopped:
            sys.stderr.write(f"logratio: {stopped}\n")
            return STATUS
        except KeyboardInterrupt:
            print("logratio: interrupted", file=sys.stderr)
            return 130


def dispatch(argv: list[str]) -> int:
    others = {entry.name: entry for entry in entry_points(group=COMMANDS)}
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: logratio COMMAND ...\n\n" + TRAIN_HELP)
        for name, entry in others.items():
            print(f"{name:<15} {summary(entry)}".rstrip())
        return 0 if argv else 2
    command, rest = argv[0], argv[1:]
    if command == "train":
        config = parse_train(rest)
        from transformers.utils import logging

        from .loop import train

        logging.disable_progress_bar()
        train(config, planner())
        return 0
    if command in others:
        run: Callable[[list[str]], int] = others[command].load()
        return run(rest)
    missing = "" if others else "; the others are there once the package is installed (`pip install -e .`)"
    raise UserError(f"unknown command {command!r}, expected one of: {', '.join(['train', *others])}{missing}")


def planner() -> Any:
    """What predicts a run's memory, where a package has entered it; see `loop.Planner`."""
    found = next(iter(entry_points(group=PLANNERS)), None)
    return None if found is None else found.load()


def summary(entry: EntryPoint) -> str:
    """The first line of the docstring of the function that is entered, read without importing its module."""
    spec = importlib.util.find_spec(entry.module)
    if spec is None or spec.origin is None:
        return ""
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


if __name__ == "__main__":
    sys.exit(main())
