"""`logratio migrate`: a file of TRL's as one of ours."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from .config.files import read_entries
from .errors import UserError
from .trl_names import Judged, Kind, consider
from .trl_names.shown import line_of, rows_of, show

METHODS = ("sft", "dpo", "kto", "orpo", "cpo", "tpo", "grpo", "rloo")
"""TRL's."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is read and written."""

    file: Annotated[str, tyro.conf.Positional]
    """A YAML file of TRL's options."""
    method: str | None = None
    """sft, dpo, kto, orpo, cpo, tpo, grpo or rloo (default: the only one that the file's options fit)."""
    output: str | None = None
    """File to write (default: print it, and the table on the error stream)."""


def main(argv: list[str] | None = None) -> int:
    """Write a YAML file of TRL's as one of ours, and say what becomes of each option."""
    options = tyro.cli(Options, args=argv, prog="logratio migrate", use_underscores=True)
    path = Path(options.file)
    entries = read_entries(path, str(path))
    method = options.method or method_of(entries, str(path))
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}, expected one of: {', '.join(METHODS)}")
    judged = consider(method, entries)
    show(judged, str(path), sys.stdout if options.output else sys.stderr)
    judged.check(str(path))
    text = yaml_of(judged, path.name)
    if options.output is None:
        print(text, end="")
        return 0
    write(Path(options.output), text)
    print(f"written to {options.output}: logratio train {judged.method} --config {options.output}")
    return 0


def method_of(entries: Mapping[Any, Any], source: str) -> str:
    """The method of which a file's options are, by fewest refusals; UserError where several have as few."""
    refusals = {method: len(consider(method, entries).refused) for method in METHODS}
    best = [method for method, count in refusals.items() if count == min(refusals.values())]
    if len(best) > 1:
        raise UserError(f"{source} does not say its method, and fits {', '.join(best)}: add --method {best[0]}, say")
    return best[0]


def yaml_of(judged: Judged, source: str) -> str:
    """Our options, each with what it was, and what has none."""

    def entry(name: str, value: Any) -> str:
        flow = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
        return f"{name}: {flow.rstrip().removesuffix('...').rstrip()}"

    # above the first option that it became
    why = {next(iter(v.became)): v for v in judged.verdicts if v.kind is Kind.TRANSLATED and v.became}
    lines = [f"# from {source}: logratio train {judged.method} --config this"]
    if judged.env:
        lines.append(entry("env", judged.env))
    for name, value in judged.options.items():
        if name in why:
            lines.append(f"# {line_of(why[name]).strip()}")
        lines.append(entry(name, value))
    lines += [f"# {line_of(verdict).strip()}" for verdict in rows_of(judged) if verdict.kind is not Kind.TRANSLATED]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """A new file, whole or not at all."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"--output {path} is there already; choose another name") from None
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from error
