"""What a terminal shows of a run, by its width: two lines, or beside these the last steps as bars.

Below `WIDE` columns: the bar with the step and the time left, and the three figures that matter for the method. From
there on: sparklines, the last evaluation, the memory beside what was planned, a sample of what is trained on, and the
last alarm.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .samples import fitted, one_line
from .sparkline import sparkline

WIDE, KEPT = 110, 200
FIGURES = (
    ("completions/mean_length", ("reward", "kl", "entropy", "loss"), "completions/mean_length"),
    ("rewards/accuracies", ("loss", "rewards/accuracies"), "rewards/margins"),
    ("rewards/margins", ("loss", "kl"), "rewards/margins"),
    ("loss", ("loss", "kl", "mean_token_accuracy", "nll"), "grad_norm"),
)
"""(a metric that tells the method; of these the first two that the log has; and this one): what is shown of a step."""
CURVES = ("loss", "reward", "rewards/margins", "kl", "grad_norm", "learning_rate")
MACHINE = {
    "tokens_per_s": "{:,.0f} tokens/s",
    "step_ms": "{:,.0f} ms a step",
    "peak_mem_mib": "memory {:,.0f} MiB at its peak",
}
SHORT = {"mean_token_accuracy": "accuracy", "learning_rate": "rate"}
"""Metrics whose last part is too long, or says too little."""


def figures_of(row: Mapping[str, Any]) -> list[str]:
    """The names of the three figures that matter for the method whose row this is; fewer where it has not got them."""
    for sign, first, last in FIGURES:
        if sign in row:
            return [name for name in ([name for name in first if name in row][:2] + [last]) if known(row, name)]
    return []


def evaluation_of(row: Mapping[str, Any]) -> str:
    """The same figures of the evaluation whose metrics are in the row, and the mean of each reward with its interval;
    "" where it has none."""
    own = evaluated(row)
    told = [f"{name} {own[name]:.4g}" for name in figures_of(own)]
    for name in own:
        if "/mean@" in name and not name.endswith(("_low", "_high")):
            between = f" ({own[f'{name}_low']:.4g} to {own[f'{name}_high']:.4g})" if f"{name}_low" in own else ""
            told.append(f"{name} {own[name]:.4g}{between}")
    return "  ".join(told)


def evaluated(row: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation that are in the row, without eval_."""
    return {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}


def known(row: Mapping[str, Any], name: str) -> bool:
    return name in row and not math.isnan(row[name])


def short(name: str) -> str:
    """What a metric is called where there is little room."""
    return SHORT.get(name, name.rpartition("/")[2].removeprefix("mean_"))


def shown(value: float) -> str:
    return f"{value:.4g}"


def clock(seconds: float) -> str:
    """As 1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Screen:
    """What is known of a run, and how it looks at the console's width.

    first: the step behind which it goes on. planned: the peak of memory that was predicted, in MiB; has: what the
        device has of it.
    """

    def __init__(
        self, total_steps: int, first: int = 0, *, planned: float | None = None, has: float | None = None
    ) -> None:
        self.total, self.first, self.planned, self.has = total_steps, first, planned, has
        self.row: dict[str, Any] = {}
        self.curves: dict[str, deque[float]] = {name: deque(maxlen=KEPT) for name in CURVES}
        self.evaluation: dict[str, Any] = {}
        self.evaluated = first  # at which step
        self.alarm = ""
        self.sample: list[tuple[str, str]] = []
        """(what, text) of the prompt, and of what follows it."""
        self.started = time.perf_counter()

    def add(self, row: Mapping[str, Any]) -> None:
        """A step is done."""
        self.row = dict(row)
        for name, curve in self.curves.items():
            if name in row:
                curve.append(float(row[name]))
        if evaluation := evaluated(row):
            self.evaluation, self.evaluated = evaluation, self.step

    @property
    def step(self) -> int:
        return int(self.row.get("step", self.first))

    @property
    def left(self) -> float | None:
        """Seconds, if the steps to come take as long as those so far; None before the first."""
        done = self.step - self.first
        return (time.perf_counter() - self.started) / done * (self.total - self.step) if done else None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, plain = options.max_width, options.ascii_only
        lines: list[Any] = [self._bar(width)]
        if self.row:
            lines += self._wide(width, plain) if width >= WIDE else [self._figures(width)]
        for line in lines:
            if isinstance(line, Text):
                line.truncate(width, overflow="crop" if plain else "ellipsis")
            yield line

    def _bar(self, width: int) -> Table:
        left = "" if self.left is None else f"{clock(self.left)} left"
        grid = Table.grid(padding=(0, 1), pad_edge=False)
        for justify in ("left", "left", "right", "right"):
            grid.add_column(no_wrap=True, justify=justify)  # type: ignore[arg-type]
        cells = [f"step {self.step}/{self.total}", f"{self.step / max(1, self.total):.0%}", left]
        room = max(5, min(60, width - sum(len(cell) + 1 for cell in cells)))
        bar = ProgressBar(total=max(1, self.total), completed=self.step, width=room)
        grid.add_row(Text(cells[0], style="bold"), bar, cells[1], Text(cells[2], style="cyan"))
        return grid

    def _figures(self, width: int) -> Text:
        """On one line: by the metrics' names, or what they are called for short where these are too long."""
        names = figures_of(self.row)
        texts = [pairs([(call(name), self.row[name]) for name in names]) for call in (str, short)]
        return next((text for text in texts if text.cell_len <= width), texts[-1])

    def _wide(self, width: int, plain: bool) -> Iterator[Any]:
        figures, curves = figures_of(self.row), [name for name in CURVES if known(self.row, name)]
        alone = [name for name in figures if name not in curves]
        machine = [text.format(self.row[name]) for name, text in MACHINE.items() if name in self.row]
        if "peak_mem_mib" in self.row and (beside := self._beside()):
            machine[-1] += f" ({beside})"
        line = pairs([(name, self.row[name]) for name in alone])
        of_machine = Text("  ".join(machine), style="dim")
        both = Text("  ").join([line, of_machine]) if alone else of_machine
        yield from [both] if both.cell_len <= width else [line, of_machine]
        yield from self._curves(curves, width, plain)
        if self.evaluation:
            chosen = [(name, self.evaluation[name]) for name in figures_of(self.evaluation)]
            yield Text(f"evaluation of step {self.evaluated}  ", style="dim") + pairs(chosen)
        yield from self._sample(width, plain)
        if self.alarm:
            yield Text(" ".join(self.alarm.split()), style="yellow")

    def _beside(self) -> str:
        """What the memory's peak is to be compared with."""
        told = {"planned {:,.0f}": self.planned, "of {:,.0f}": self.has}
        return ", ".join(text.format(value) for text, value in told.items() if value)

    def _sample(self, width: int, plain: bool) -> Iterator[Text]:
        """A line for the prompt, whose end is shown, and one for each text that follows."""
        for number, (what, text) in enumerate(self.sample):
            begin, said = f"{what}: ", one_line(text)
            if plain:
                said = said.encode("ascii", "backslashreplace").decode()
            line = Text(fitted(begin, said, width, end=number == 0))
            line.stylize("dim", 0, len(begin))
            yield line

    def _curves(self, names: Sequence[str], width: int, plain: bool) -> Iterator[Text]:
        """Two or three beside each other, each with its name, its last value and its bars."""
        across = 2 if width < 160 else 3
        cell = width // across
        label = max((len(name) for name in names), default=0)
        for start in range(0, len(names), across):
            line = Text()
            for name in names[start : start + across]:
                line.append(f"{name:<{label}} ", style="dim")
                line.append(f"{shown(self.row[name]):<11} ", style="bold")
                bars = sparkline(self.curves[name], cell - label - 15, plain=plain)
                line.append(f"{bars:<{cell - label - 13}}", style="green")
            line.rstrip()
            yield line


def pairs(figures: Sequence[tuple[str, float]]) -> Text:
    text = Text()
    for number, (name, value) in enumerate(figures):
        text.append(f"{'  ' if number else ''}{name} ", style="dim")
        text.append(shown(value), style="bold")
    return text
