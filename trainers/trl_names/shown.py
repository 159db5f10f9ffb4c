"""Verdicts as a person reads them: a table on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .verdicts import Judged, Kind, Verdict, said

STYLES = {Kind.REFUSED: "bold red", Kind.TRANSLATED: "cyan", Kind.NO_EFFECT: "dim", Kind.ABSENT: "yellow"}
"""Kinds that have a row each, in this order; what is taken as it stands is one line."""


def show(judged: Judged, source: str, file: TextIO | None = None) -> None:
    """Print all verdicts on a file of options."""
    console = Console(file=file or sys.stdout)
    taken = [verdict for verdict in judged.verdicts if verdict.kind is Kind.TAKEN]
    title = f"{source}, judged by TRL 1.16's names"
    if not console.is_terminal:
        lines = [title, *(line_of(verdict) for verdict in rows_of(judged))]
        if taken:
            lines.append(f"  taken: {', '.join(one(verdict) for verdict in taken)}")
        print("\n".join(lines), file=console.file, flush=True)
        return
    table = Table(title=escape(title), title_justify="left", header_style="bold", pad_edge=False)
    for name in ("option", "", "here", "why"):
        table.add_column(name, overflow="fold")
    for verdict in rows_of(judged):
        cells = (one(verdict), verdict.kind.value, became(verdict.became), verdict.reason)
        table.add_row(*map(escape, cells), style=STYLES[verdict.kind])
    if table.row_count:
        console.print(table)
    if taken:
        console.print(escape(f"taken as they stand: {', '.join(one(verdict) for verdict in taken)}"), highlight=False)


def rows_of(judged: Judged) -> list[Verdict]:
    """What is not simply taken, by kind."""
    everything = [*judged.verdicts, *judged.absent]
    return [verdict for kind in STYLES for verdict in everything if verdict.kind is kind]


def line_of(verdict: Verdict) -> str:
    arrow = f" -> {became(verdict.became)}" if verdict.kind is Kind.TRANSLATED and verdict.became else ""
    key = verdict.key if verdict.kind is Kind.ABSENT else one(verdict)
    return f"  {verdict.kind}: {key}{arrow}{f' ({verdict.reason})' if verdict.reason else ''}"


def one(verdict: Verdict) -> str:
    return f"{verdict.key}: {said(verdict.value)}"


def became(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {said(value)}" for name, value in options.items())
