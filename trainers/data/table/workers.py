"""Rows tokenized by several processes: a range of rows each, with what one process would have made and said of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ...errors import RowError, UserError
from ..examples import Preparation
from ..report import Report

PARALLELISM = "TOKENIZERS_PARALLELISM"


@dataclass
class Part:
    """A range of rows, and the tables of what has become of them.

    report: a `Report` as a dict. seen, failed: as those of a `ChatTemplate`. error: the type of what it ended with, and
    the arguments.
    """

    start: int
    stop: int
    path: Path
    late: Path
    report: dict[str, Any] = field(default_factory=dict)
    seen: set[Any] = field(default_factory=set)
    failed: set[Any] = field(default_factory=set)
    error: tuple[type[Exception], tuple[Any, ...]] | None = None


Done = Callable[[int], None]
Work = Callable[[Preparation, Part, Done], None]


def in_processes(preparation: Preparation, work: Work, count: int, own: Path, done: Done) -> Iterator[Part]:
    """The parts that `count` processes have made, in order; the preparation's report and bad rows have all of them.

    A process is forked, so that rows and tokenizer are there. Raises UserError at the first row that cannot be used,
    in the order of the rows, whoever met one first.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise UserError("--dataset_num_proc: this system cannot fork processes; leave it at 1")
    total = len(preparation.rows)
    cuts = [total * n // count for n in range(count + 1)]
    parts = [
        Part(cuts[n], cuts[n + 1], own.with_name(f"{own.name}.{n}"), own.with_name(f"{own.name}.{n}.late"))
        for n in range(count)
    ]
    template = preparation.encoder.template
    finished: dict[Connection, Part] = {}
    with _started(preparation, work, parts) as connections:
        for number, connection in enumerate(connections):
            part = _result(connection, connections[number:], finished, done)
            # A kind of message that was rendered once is not tried again, and an earlier part has.
            if part.failed & template.seen:
                part = parts[number]
                work(preparation, part, done)
                yield part
                continue
            if part.error is not None:
                kind, arguments = part.error
                raise kind(*arguments)
            preparation.report.add(Report.from_dict(part.report, preparation.rows))
            template.seen |= part.seen
            yield part


@contextlib.contextmanager
def _started(preparation: Preparation, work: Work, parts: list[Part]) -> Iterator[list[Connection]]:
    """Inside, a process works on each part, and sends how many more rows are done, then the part."""
    context: Any = multiprocessing.get_context("fork")
    connections, processes = [], []
    # Else tokenizers warns of a fork; a process with a part of its own uses one core.
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        for part in parts:
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(preparation, work, part, sending), daemon=True)
            process.start()
            sending.close()
            connections.append(receiving)
            processes.append(process)
    finally:
        os.environ.pop(PARALLELISM)
        if before is not None:
            os.environ[PARALLELISM] = before
    try:
        yield connections
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _run(preparation: Preparation, work: Work, part: Part, sending: Connection) -> None:
    # Whatever the program does at a signal, a worker ends when it is told to, and an interrupt is the program's.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work(preparation, part, sending.send)
    except RowError as error:
        part.error = (RowError, (error.place, str(error)[len(error.place) :], error.row))
    except UserError as error:
        part.error = (UserError, (str(error),))
    except OSError as error:
        part.error = (OSError, (error.errno, error.strerror or str(error)))
    except Exception:
        part.error = (RuntimeError, (traceback.format_exc(),))
    part.report, template = preparation.report.as_dict(), preparation.encoder.template
    part.seen, part.failed = template.seen, template.failed
    sending.send(part)
    sending.close()


def _result(connection: Connection, running: list[Connection], finished: dict[Connection, Part], done: Done) -> Part:
    """The part of this process. finished: takes up those that others finish meanwhile; rows that are done are told."""
    while connection not in finished:
        for ready in wait([one for one in running if one not in finished]):
            assert isinstance(ready, Connection)
            try:
                said = ready.recv()
            except EOFError:
                raise UserError(
                    "a process of --dataset_num_proc has ended before its rows were tokenized: perhaps the system ran "
                    "out of memory; use fewer"
                ) from None
            if isinstance(said, Part):
                finished[ready] = said
            else:
                done(said)
    return finished[connection]
