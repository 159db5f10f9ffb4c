"""A data set's table: taken from the cache, or made of its rows by one process or several."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from logratio.losses import Kind

from ...errors import RowError, UserError, counted, listed
from ...logs.streams import Lasting
from ..examples import Preparation
from ..report import Report, count_reasons
from ..rows import Rows
from . import cache
from .workers import Part, in_processes
from .writer import TableWriter

TICK = 200  # rows
LOOKED_AT = 1000  # rows behind one that cannot be used, so that all of a kind are mended at once


def make_table(rows: Rows, kind: Kind, tokenizer: Any, *, num_proc: int = 1, **options: Any) -> tuple[Path, Report]:
    """Where the table of these rows lies, and what became of them. options: as `Preparation` has them.

    Raises UserError for a row that cannot be used, where no example remains, and where the table cannot be written.
    """
    path = cache.folder() / f"{cache.key(rows, tokenizer, {'kind': kind, **options})}.table"
    table = cache.find(path)
    if table is not None:
        return path, Report.from_dict(table.about["report"], rows)
    try:
        return path, _make(path, Preparation(rows, kind, tokenizer, **options), num_proc)
    except RowError as error:
        said = str(error)[len(error.place) :] + _bad_behind(error.row, rows, kind, tokenizer, options)
        raise RowError(error.place, said, error.row) from error


def _make(path: Path, preparation: Preparation, num_proc: int) -> Report:
    """Write the table; what became of the rows."""
    rows = preparation.rows
    with cache.place(path) as own, TableWriter(own) as writer, progress(rows.name, len(rows)) as done:
        late = own.with_name(f"{own.name}.late")
        if num_proc == 1:
            write_part(preparation, writer, late, 0, None, done)
            writer.append_table(late)
        else:
            parts = list(in_processes(preparation, write_in_worker, num_proc, own, done))
            for part in parts:
                writer.append_table(part.path)
            for part in parts:
                writer.append_table(part.late)
        preparation.report.check_left(preparation.max_length)
        rows.check_unchanged()
        writer.close({"report": preparation.report.as_dict(), "rows": len(rows)})
    return preparation.report


def _bad_behind(row: int, rows: Rows, kind: Kind, tokenizer: Any, options: dict[str, Any]) -> str:
    """How many of the rows behind a bad one cannot be used either, of those looked at; nothing where all can."""
    looked = min(LOOKED_AT, len(rows) - row - 1)
    if not looked:
        return ""
    try:
        preparation = Preparation(rows, kind, tokenizer, **{**options, "on_bad_row": "skip"})
        for _ in preparation.made(row + 1, row + 1 + looked):
            pass
    except UserError:  # what is wrong there is said when its turn comes
        return ""
    errors = [error for error in preparation.report.errors if error.row > row]
    if not errors:
        return ""
    numbers = [error.row if rows.lines is None else rows.lines[error.row] for error in errors]
    where = f"{'row' if rows.lines is None else 'line'}{'s' * (len(numbers) > 1)} {listed(numbers)}"
    return (
        f"; {len(errors)} of the {counted(looked, 'row')} behind it cannot be used either ({where}: "
        f"{count_reasons(errors)}): mend them all, or leave such rows out with --on_bad_row skip"
    )


def write_part(
    preparation: Preparation,
    writer: TableWriter,
    late: Path,
    start: int,
    stop: int | None,
    done: Callable[[int], None],
) -> None:
    """Tokenize the rows from `start` to `stop` into `writer`, and what comes behind all others into a table `late`.

    done: told, now and then, how many more rows are.
    """
    told = start
    with TableWriter(late) as behind:
        for made in preparation.made(start, stop):
            (behind if preparation.comes_late(made) else writer).add(made)
            if made.row - told >= TICK:
                done(made.row - told)
                told = made.row
        behind.close()


def write_in_worker(preparation: Preparation, part: Part, done: Callable[[int], None]) -> None:
    """The same into tables of its own."""
    with TableWriter(part.path) as writer:
        write_part(preparation, writer, part.late, part.start, part.stop, done)
        writer.close()


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Inside, a bar on a terminal, which is moved on by what is returned."""
    shown: Any = None if sys.stdout is None else Lasting(sys.stdout)
    console = Console(file=shown)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"tokenizing {what}", total=total)
        yield lambda more: bar.advance(task, more)
