"""`logratio bench RUN.yaml`: a step of one's own run, measured.

RUN.yaml is a file of options as `logratio train METHOD --config` takes it: ours, TRL's, or a run's run_config.json (or
the run's folder); or `logratio bench METHOD ...` with what `logratio train METHOD ...` is given. Further options are
those of `logratio train METHOD`, and go before the file's.
Measured are the run's own model, data and options: time, tokens and memory of a step by part beside what `logratio
plan` reckons, the host's own time, TRL's trainer with the same options where it has them, and the largest and the
fastest --micro_batch_tokens by trial. Nothing is written to the run's output_dir.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from logratio.trainers.config import RunConfig
from logratio.trainers.config.files import read_entries
from logratio.trainers.config.words import hints_of, refuse_misfits
from logratio.trainers.errors import UserError
from logratio.trainers.memory import no_room
from logratio.trainers.migrate import METHODS, method_of
from logratio.trainers.options import RUN, options_among, parse_train

from ..pages.page import check_target, made
from ..progress import say
from ..reporting.files import write
from ..reporting.records import Records, certificate, device_name
from ..reporting.tables import on_screen
from . import told
from .measuring import Measured, measure
from .page import MAKER, NAME, rendered
from .spent import as_rows
from .subject import build_subject
from .theirs import case_of

LINES = "bench.jsonl"
CONFIG = "run_config.json"
FILES = (".yaml", ".yml", ".json")


@dataclass
class Options:
    """What to measure, and where to write it."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN.yaml|METHOD")]
    """A file of options as `logratio train METHOD --config` takes it, or a run's folder; or a method."""
    method: str | None = None
    """sft, dpo, kto, orpo, cpo, tpo, grpo or rloo (default: what the file says, or the only one that its options
    fit)."""
    output: Path | None = None
    """Folder of bench.html and bench.jsonl (default: bench/NAME, by the file's name)."""
    repeats: Annotated[int, tyro.conf.arg(metavar="INT")] = 6
    """Steps of each contestant that are timed."""
    steps: int = 3
    """Of how many different steps' data, in turn."""
    trl: bool = True
    """Measure TRL's trainer beside it."""
    trial: bool = True
    """Look for the largest and the fastest micro_batch_tokens."""
    threads: int | None = None
    """Of torch on a CPU (default: its own choice)."""


def names_a_run(argv: Sequence[str], suites: Sequence[str]) -> bool:
    """Whether the command is about a run of one's own. UserError where it names neither that nor a suite."""
    if not argv or argv[0].startswith("-"):  # it stands behind other options, if at all
        return not any(word in suites for word in argv) and any(word.endswith(FILES) for word in argv)
    first = argv[0]
    if first in suites or first in METHODS:
        return first in METHODS
    if not Path(first).exists():
        raise UserError(f"{first}: there is no such file, and no suite of this name ({', '.join(suites)})")
    return True


def main(argv: Sequence[str]) -> int:
    """Measure a step of a run of one's own; a page, a table, and lines of JSON."""
    options, rest = parsed(argv)
    for name in ("repeats", "steps", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} must be positive, got {value}")
    asked = parse_train(train_words(options, rest))
    name = name_of(options.run, rest)
    output = options.output or Path("bench") / name
    if options.threads:
        torch.set_num_threads(options.threads)
    quiet()
    with made(output):
        check_target(output / NAME, MAKER)
        console = Console()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = measured(asked, Path(folder) / "run", options, console)
            except torch.OutOfMemoryError as error:
                raise no_room(error) from error
            written(found, name, output, options)
        show(found, name, console)
        say(console, f"{output / NAME}, and lines in {output / LINES}")
    return 0


def parsed(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Ours, and the words that are for the run."""
    if argv and not argv[0].startswith("-"):  # or the run's name may stand behind an option of ours
        refuse_misfits(argv, hints_of([Options]))
    options, rest = tyro.cli(
        Options, args=argv, prog="logratio bench", description=__doc__, return_unknown_args=True, use_underscores=True
    )
    return options, list(rest)


def file_of(run: str) -> Path:
    """The file of options that a name stands for."""
    return Path(run) / CONFIG if Path(run).is_dir() else Path(run)


def name_of(run: str, rest: Sequence[str]) -> str:
    """What the run is called: by its file, or the folder of it, or the method."""
    given = options_among(rest).get("config") if run in METHODS else run
    if given is None:
        return run
    path = file_of(str(given))
    return path.resolve().parent.name if path.name == CONFIG else path.stem


def train_words(options: Options, rest: Sequence[str]) -> list[str]:
    """What `logratio train` would be given. UserError where the file cannot be read, or is of no one method."""
    if options.run in METHODS:
        return [options.run, *rest]
    path, method = file_of(options.run), options.method
    entries = read_entries(path, str(path))
    if method is None and not RUN <= entries.keys() and not any(word.partition("=")[0] == "--loss" for word in rest):
        method = method_of(entries, str(path))
    return [*([method] if method else []), "--config", str(path), *rest]


def quiet() -> None:
    """No bars of loading weights, and nothing that torch's profiler says of itself."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def measured(asked: RunConfig, folder: Path, options: Options, console: Console) -> Measured:
    def tell(line: str) -> None:
        say(console, f"  {line}")

    subject = build_subject(asked, folder, options.steps, tell)
    for note in subject.notes:
        tell(note)
    case = case_of(asked, subject.run.config)
    return measure(subject, case, repeats=options.repeats, trl=options.trl, trial=options.trial, say=tell)


def written(found: Measured, name: str, output: Path, options: Options) -> None:
    """The page, and a line for each contestant."""
    device = found.subject.device
    config = found.subject.run.config.as_dict()
    config["train"].pop("output_dir")
    settings = {"repeats": options.repeats, "steps": options.steps, **config}
    born = certificate(device, settings)
    records = Records(output / LINES, fresh=True)
    for contestant in found.rows:
        stub = {"suite": "run", "case": found.case.case, "contestant": contestant, "gpu": device_name(device)}
        records.add({**stub, **found.case.fields(), **told.record(found, contestant), "certificate": born})
    write(output / NAME, rendered(found, name, born).encode("utf-8", "replace"))


def show(found: Measured, name: str, console: Console) -> None:
    """Tables on a terminal."""
    console.print(on_screen(f"{name}: a step", told.COLUMNS, [
        told.line_of(who, row, short=True) for who, row in found.rows.items() if row["status"] == "ok"
    ]))  # fmt: skip
    rows = [[part, told.mib(a), told.mib(b)] for part, a, b in as_rows(found.memory, found.plan)]
    console.print(on_screen("memory by part, MiB", ("part", "measured", "planned"), rows))
    if (looked := found.budgets) is not None:
        lines = [
            [f"{one.tokens:,}", told.ms(one.step_ms), told.mib(one.memory_mib), told.outcome(one, found)]
            for one in looked.budgets
        ]
        console.print(on_screen("micro_batch_tokens", ("tokens", "step, ms", "memory, MiB", ""), lines))
    plan = f"no plan stands beside it: {found.plan.why_not}" if found.plan.why_not else ""
    for line in filter(None, (told.verdict(found), *told.budget_lines(found), told.rollout_line(found), plan)):
        say(console, line)
