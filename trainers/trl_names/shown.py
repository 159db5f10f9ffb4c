"""Verdicts as a person reads them: a table on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .verdicts import Judged, Kind, Verdict, said

STYLES = {Kind.REFUSED: "red", Kind.TRANSLATED: "cyan", Kind.NO_EFFECT: "blue", Kind.ABSENT: "yellow"}
"""Kinds whose options have a row each, in this order; what is taken as it stands is one row."""


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
    table = Table(title=escape(title), title_justify="left", title_style="bold", show_header=False, box=SIMPLE_HEAD)
    table.add_column(overflow="fold", ratio=2)
    table.add_column(overflow="fold", ratio=3)
    for kind, style in STYLES.items():
        rows = [verdict for verdict in rows_of(judged) if verdict.kind is kind]
        if rows:
            table.add_row(kind.value, style=f"bold {style}")
        for verdict in rows:
            table.add_row(escape(named(verdict)), escape(f"{became(verdict.became)}  {verdict.reason}".strip()))
        if rows:
            table.add_section()
    if taken:
        table.add_row(Kind.TAKEN.value, escape(", ".join(map(one, taken))))
    console.print(table, highlight=False)


def rows_of(judged: Judged) -> list[Verdict]:
    """What is not simply taken, by kind."""
    everything = [*judged.verdicts, *judged.absent]
    return [verdict for kind in STYLES for verdict in everything if verdict.kind is kind]


def line_of(verdict: Verdict) -> str:
    arrow = f" -> {became(verdict.became)}" if verdict.kind is Kind.TRANSLATED and verdict.became else ""
    return f"  {verdict.kind}: {named(verdict)}{arrow}{f' ({verdict.reason})' if verdict.reason else ''}"


def named(verdict: Verdict) -> str:
    return verdict.key if verdict.kind is Kind.ABSENT else one(verdict)


def one(verdict: Verdict) -> str:
    return f"{verdict.key}: {said(verdict.value)}"


def became(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {said(value)}" for name, value in options.items())
