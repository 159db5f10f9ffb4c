"""The command line: `logratio train METHOD ...`, and the sub-commands that other packages enter.

Options are the fields of the configuration's dataclasses and of the loss itself, with flat names in any order. A YAML
file (`--config`) gives the same options; what is said on the command line wins.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
import yaml

from logratio.losses import LOSSES, Kind, Loss

from .config import DataConfig, ModelConfig, RolloutConfig, RunConfig, TrainConfig
from .errors import UserError
from .plugins import import_object

COMMANDS = "logratio.commands"
TRAIN_HELP = "train METHOD    train with one of: {methods}; `logratio train METHOD --help` lists the options"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `logratio`; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return dispatch(argv)
    except UserError as error:
        sys.stderr.write(f"logratio: {error}\n")  # in one piece: other processes write too
        return 1
    except KeyboardInterrupt:
        print("logratio: interrupted", file=sys.stderr)
        return 130


def dispatch(argv: list[str]) -> int:
    others = {entry.name: entry for entry in entry_points(group=COMMANDS)}
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: logratio COMMAND ...\n\n" + TRAIN_HELP.format(methods=", ".join(LOSSES)))
        for name, entry in others.items():
            print(f"{name:<15} {(entry.load().__doc__ or '').strip().partition(chr(10))[0]}".rstrip())
        return 0 if argv else 2
    command, rest = argv[0], argv[1:]
    if command == "train":
        config = parse_train(rest)
        from transformers.utils import logging

        from .loop import train

        logging.disable_progress_bar()
        # PEFT's use of a name that transformers is about to drop
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        train(config)
        return 0
    if command in others:
        run: Callable[[list[str]], int] = others[command].load()
        return run(rest)
    missing = "" if others else "; the others are there once the package is installed (`pip install -e .`)"
    raise UserError(f"unknown command {command!r}, expected one of: {', '.join(['train', *others])}{missing}")


def parse_train(argv: list[str]) -> RunConfig:
    """METHOD and options -> configuration. Exits with a message for options that do not parse, as argparse does."""
    argv = list(argv)
    custom = _take(argv, "--loss")
    if not argv or argv[0].startswith("-"):
        if argv[:1] not in (["-h"], ["--help"]) and custom is None:
            raise UserError(f"train needs a method, one of: {', '.join(LOSSES)}")
        if custom is None:
            print(TRAIN_HELP.format(methods=", ".join(LOSSES)))
            raise SystemExit(0)
        argv.insert(0, "custom")
    method = argv.pop(0)
    if custom is None and method not in LOSSES:
        raise UserError(f"unknown method {method!r}, expected one of: {', '.join(LOSSES)}")
    loss = load_loss(custom) if custom else LOSSES[method]

    parts: dict[str, Any] = {"loss": loss, "model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    if loss.kind is Kind.GROUPED:
        parts["rollout"] = RolloutConfig
    config_file = _take(argv, "--config")
    if config_file:
        argv = [*yaml_options(Path(config_file), parts.values()), *argv]
    flat = dataclasses.make_dataclass(
        "Options",
        [
            (name, Annotated[part, tyro.conf.arg(name="")], dataclasses.field(default_factory=part))
            for name, part in parts.items()
        ],
    )
    try:
        options: Any = tyro.cli(
            flat, args=argv, prog=f"logratio train {method}", config=(tyro.conf.AvoidSubcommands,), use_underscores=True
        )
    except ValueError as error:  # a loss refuses its fields
        raise UserError(str(error)) from error
    return RunConfig(method=method, **{name: getattr(options, name) for name in parts})


def load_loss(name: str) -> type[Loss]:
    """`module:Class`, or a registered name."""
    if name in LOSSES:
        return LOSSES[name]
    if ":" not in name:
        raise UserError(f"--loss {name!r} is neither module:Class nor one of: {', '.join(LOSSES)}")
    loss = import_object(name, "--loss")
    if not (
        isinstance(loss, type) and issubclass(loss, Loss) and hasattr(loss, "kind") and dataclasses.is_dataclass(loss)
    ):
        raise UserError(f"--loss {name!r} is not a dataclass derived from logratio.losses.Loss with a `kind`")
    return loss


def yaml_options(path: Path, parts: Any) -> list[str]:
    """The file's entries as command-line words, so that types are checked in one place only."""
    try:
        entries = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(entries, dict):
        raise UserError(f"--config {path} must map option names to values, got a {type(entries).__name__}")
    known = {f.name: get_type_hints(part)[f.name] for part in parts for f in dataclasses.fields(part)}
    words: list[str] = []
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"--config {path}: unknown option {key!r}")
        if isinstance(value, bool) and known[name] is bool:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def _take(argv: list[str], option: str) -> str | None:
    """Remove `option VALUE` or `option=VALUE` from argv and return the value."""
    for i, word in enumerate(argv):
        if word == option:
            if i + 1 == len(argv):
                raise UserError(f"{option} needs a value")
            value = argv[i + 1]
            del argv[i : i + 2]
            return value
        if word.startswith(option + "="):
            del argv[i]
            return word.split("=", 1)[1]
    return None


if __name__ == "__main__":
    sys.exit(main())
