"""What stands in a comparison, and how it is written.

    sft                                     a method with its defaults
    dpo:ipo                                 METHOD:VARIANT, short for dpo --loss_type ipo
    "dpo --beta 0.5"                        a method with options, as after `logratio train`
    "soft=dpo:cdpo --label_smoothing 0.1"   the same with a name of its own
    "my_loss:SquaredHinge --beta 0.2"       a loss of your own, module:Class

A YAML file has them under `contestants`, as a list of these or as a mapping from names, and other options beside.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logratio.losses import LOSSES
from logratio.trainers.config import RunConfig
from logratio.trainers.config.files import read_entries
from logratio.trainers.errors import UserError, shown
from logratio.trainers.options import load_loss, parse_train

FILES = (".yaml", ".yml", ".json")
DECIDED = {
    "output_dir": "--output_dir of the comparison",
    "overwrite_output_dir": "--fresh",
    "resume_from_checkpoint": "what has its line already, which is not run again",
    "seed": "--seeds",
    "max_steps": "--max_steps, --max_tokens or --max_seconds of all",
    "num_train_epochs": "--max_steps, --max_tokens or --max_seconds of all",
    "dataset_name": "--dataset_name of all",
    "dataset_test_split": "--dataset_test_split of all",
    "eval_size": "--eval_rows of all",
    "eval_steps": "--checks of all",
    "shuffle": "the order of each seed, which all share",
    "reward_funcs": "--reward_funcs of all",
    "max_completion_length": "--max_completion_length of all",
    "model_name_or_path": "--model_name_or_path of all, which start alike",
}
"""Options of a run that are the comparison's, and what says so instead."""


@dataclass(frozen=True)
class Contestant:
    """words: what `logratio train` would be given, without what is common to all. spec: as it was written."""

    name: str
    spec: str
    words: tuple[str, ...]

    def config(self, common: Sequence[str] = ()) -> RunConfig:
        """Its run, with the common options first, which its own go before."""
        head = 2 if self.words[0] == "--loss" else 1
        try:
            return parse_train([*self.words[:head], *common, *self.words[head:]])
        except UserError as error:
            raise UserError(f"contestant {self.spec!r}: {error}") from error


def contestant(spec: str, name: str | None = None) -> Contestant:
    """One of them, as it was written. UserError where it is none."""
    try:
        words = shlex.split(spec)
    except ValueError as error:
        raise UserError(f"contestant {spec!r} cannot be read: {error}") from error
    if name is None and words and (named := re.fullmatch(r"([^=:-][^=:]*)=(\S+)", words[0])):
        name, words[0] = named.groups()
    if not words:
        raise UserError(f"contestant {spec!r} is empty: write a method with its options, or module:Class")
    check_options(spec, words[1:])
    method, colon, variant = words[0].partition(":")
    if method in LOSSES and colon:
        given = [word for word in words if word.partition("=")[0] == "--loss_type"]
        if given:
            raise UserError(f"contestant {spec!r} has the loss_type twice: {words[0]} says it already")
        head = [method, "--loss_type", variant]
    elif method in LOSSES:
        head = [method]
    elif colon:
        load_loss(words[0])
        head = ["--loss", words[0]]
    else:
        raise UserError(
            f"contestant {spec!r}: {words[0]!r} is neither a method ({', '.join(sorted(LOSSES))}), METHOD:VARIANT, nor "
            "a loss of your own as module:Class"
        )
    return Contestant(name or " ".join(words), spec, (*head, *words[1:]))


def check_options(source: str, words: Sequence[str]) -> None:
    """Raise UserError for an option that all contestants share by definition."""
    for word in words:
        name = word.partition("=")[0].removeprefix("--").removeprefix("no-").removeprefix("no_").replace("-", "_")
        if word.startswith("--") and name in DECIDED:
            raise UserError(f"contestant {source!r}: --{name} is decided by {DECIDED[name]}; leave it out")


def check_contestants(found: Sequence[Contestant]) -> None:
    """UserError where there are fewer than two, or two of one name."""
    if len(found) < 2:
        raise UserError(f"a comparison needs two contestants at least, got {len(found)}")
    twice = [name for name, count in Counter(one.name for one in found).items() if count > 1]
    if twice:
        raise UserError(f"two contestants are called {twice[0]!r}: give one a name of its own, as in 'b={twice[0]}'")


def read_file(path: Path) -> tuple[list[Contestant], list[str]]:
    """(contestants, other options as words of a command line) of a file. UserError where it has none."""
    entries = read_entries(path, str(path))
    specs: list[tuple[str | None, Any]]
    listed: Any = entries.pop("contestants", None)
    if isinstance(listed, Mapping):
        specs = [(str(name), spec) for name, spec in listed.items()]
    else:
        specs = [(None, spec) for spec in listed] if isinstance(listed, list) else []
    for _, spec in specs:
        if not isinstance(spec, str):
            raise UserError(f"{path}: a contestant is written as text, as on the command line, got {shown(spec)}")
    if not specs:
        raise UserError(f"{path} names no contestants: list them under `contestants`")
    return [contestant(spec, name) for name, spec in specs], [
        word for name, value in entries.items() for word in words_of(str(name), value)
    ]


def words_of(name: str, value: Any) -> list[str]:
    """An entry of a file as words of the command line."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
