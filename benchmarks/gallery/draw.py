"""Small multiples: a row for each variant, or for two where they have two panels each."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..reporting.palette import GREY, SERIES
from ..reporting.plots import STYLE
from .curves import Drawn

WIDTH, DOTS = 7.2, 150
"""Inches and dots an inch: at the 720 px of a page a point of type is 1.4 px."""
COLUMNS, ROW = 4, 1.15
COLOURS = 64
"""Of the palette of a file, the rare ones too."""
SMALL = {"font.size": 7.5, "axes.titlesize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7, "savefig.dpi": DOTS}


def draw(found: Mapping[str, Drawn], x_label: str, path: Path) -> None:
    """Write one picture of several variants of a family."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | SMALL)
        held = io.BytesIO()
        figure(found, x_label).savefig(held, format="png")
    held.seek(0)
    Image.open(held).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


def figure(found: Mapping[str, Drawn], x_label: str) -> Figure:
    wide = len(next(iter(found.values())).panels)
    beside = max(1, COLUMNS // wide) if len(found) > 1 else 1
    rows = -(-len(found) // beside)
    made = Figure(figsize=(WIDTH, 0.75 + ROW * rows), layout="constrained")
    axes = made.subplots(rows, wide * beside, squeeze=False, sharex=True)
    colours: dict[str, str] = {}
    for at, (name, one) in enumerate(found.items()):
        row, column = at // beside, wide * (at % beside)
        for ax, (title, lines) in zip(axes[row, column:], one.panels.items(), strict=False):
            if row == 0:
                ax.set_title(title)
            panel(ax, one.x, lines, colours)
        axes[row, column].set_ylabel(name, fontweight="bold")
    for ax in axes.flat[len(found) * wide :]:
        ax.set_visible(False)
    for ax in lowest(axes):
        ax.tick_params(labelbottom=True)
    made.supxlabel(x_label, fontsize=SMALL["font.size"])
    handles = [Line2D([], [], color=ink, label=label) for label, ink in colours.items()]
    made.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4))
    return made


def lowest(axes: Any) -> list[Axes]:
    """The last axes in use of each column."""
    width = len(axes[0])
    return [next(row[column] for row in reversed(axes) if row[column].get_visible()) for column in range(width)]


def panel(ax: Axes, x: Sequence[float], lines: Mapping[str, Sequence[float]], colours: dict[str, str]) -> None:
    """A dashed line over another that it may cover."""
    ax.axhline(0, color=GREY.light, linewidth=0.6)
    for number, (label, y) in enumerate(lines.items()):
        ink = colours.setdefault(label, SERIES[len(colours) % len(SERIES)].light)
        ax.plot(x, y, color=ink, linewidth=1.3, linestyle=("-", (0, (3, 1.5)), (0, (1, 1)), "-.")[number % 4])
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.yaxis.set_major_locator(MaxNLocator(3))
    low, high = ax.get_ylim()
    if high - low < 1e-9 + 0.02 * max(abs(low), abs(high)):  # constant
        ax.set_ylim(min(low, 0) - 0.1 * max(abs(low), 1e-9), max(high, 0) + 0.1 * max(abs(high), 1e-9))
