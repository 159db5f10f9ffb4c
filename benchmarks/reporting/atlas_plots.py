"""The plots of docs/atlas.md: how near each loss is to a peer's, and what a split of the batch moves.

Both show relative errors on a logarithmic scale with the bound of *equal* as a line; a 0 stands at the left edge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .palette import GREY, GRID, colour
from .plots import STYLE, WIDTH, titled

NAMES = {"ours": "logratio", "trl": "TRL", "liger": "Liger"}
ERRORS = {"loss_rel_err": "relative error of the loss", "grad_rel_err": "relative error of the gradient"}
LEFT = 1e-8
"""Where a 0 stands."""
FILES = {
    "atlas-errors.png": "Losses and gradients beside TRL's and Liger's",
    "atlas-splits.png": "What a split changes",
}
"""Name and title of each image."""


def draw(atlas: Mapping[str, Any], folder: Path) -> None:
    """Write both images. Each carries `stamp` of its rows, and neither software nor date."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        for (file, title), figure in zip(FILES.items(), (errors(atlas), splits(atlas)), strict=True):
            titled(figure, title, [atlas["command"], *(f"{name} {v}" for name, v in atlas["versions"].items())])
            told = {"Software": None, "Source": stamp(atlas)}
            figure.savefig(folder / file, format="png", metadata=told)


def stamp(atlas: Mapping[str, Any]) -> str:
    """Of the rows that are drawn: tells whether an image is of these measurements."""
    return f"{crc32(json.dumps([atlas['variants'], atlas['splits']]).encode()):08x}"


def errors(atlas: Mapping[str, Any]) -> Figure:
    """A dot for each variant, a row for each method and peer; the loss to the left, the gradient to the right."""
    measured = [row for row in atlas["variants"] if row["verdict"] != "refused"]
    rows = list(dict.fromkeys((method_of(row), row["peer"]) for row in measured))
    figure = Figure(figsize=(WIDTH, 1.2 + 0.26 * len(rows)), layout="constrained")
    for ax, (key, label) in zip(figure.subplots(1, 2, sharey=True), ERRORS.items(), strict=True):
        for row in measured:
            y = rows.index((method_of(row), row["peer"]))
            dot(ax, row[key], y, row["peer"])
        scaled(ax, atlas["equal"], 20.0, label)
        labelled(ax, [f"{method.upper()}, {NAMES[peer]}" for method, peer in rows])
    legend(figure, ("trl", "liger"), atlas["equal"])
    return figure


def splits(atlas: Mapping[str, Any]) -> Figure:
    """A row for each variant that a split moves in a peer, the most moved first; below, in one row, all others."""
    moved = sorted((row for row in atlas["splits"] if row["reasons"]), key=most, reverse=True)
    others = [row for row in atlas["splits"] if not row["reasons"]]
    figure = Figure(figsize=(WIDTH, 1.4 + 0.17 * (len(moved) + 1)), layout="constrained")
    ax = figure.subplots()
    for y, row in [*enumerate(moved), *((len(moved), row) for row in others)]:
        if row["reasons"]:
            ax.plot([row["ours"], most(row)], [y, y], color=GRID.light, linewidth=2, zorder=1)
        for who in reversed(NAMES):
            if who in row:
                dot(ax, row[who], y, who)
    scaled(ax, atlas["equal"], 2.0, f"|change of the gradient| / |gradient|, one batch cut in {atlas['parts']}")
    labelled(ax, [*(row["variant"] for row in moved), f"the other {len(others)} variants"])
    ax.tick_params(axis="y", labelsize=7)
    legend(figure, tuple(NAMES), atlas["equal"])
    return figure


def method_of(row: Mapping[str, Any]) -> str:
    return str(row["variant"]).split()[0]


def most(row: Mapping[str, Any]) -> float:
    """The largest change of a peer's."""
    return float(max(row.get(peer, 0.0) for peer in ("trl", "liger")))


FORMS: dict[str, dict[str, Any]] = {
    "ours": {"marker": "s", "markersize": 3.5, "alpha": 0.8},
    "trl": {"marker": "o", "markersize": 4.5, "alpha": 0.8},
    "liger": {"marker": "o", "markersize": 7, "markerfacecolor": "none", "markeredgewidth": 1.3},
}
"""Liger's is a ring and ours a square: where two have the same number, both are seen."""


def dot(ax: Axes, value: float, y: int, who: str) -> None:
    ink = colour("logratio" if who == "ours" else who)
    ax.plot(max(value, LEFT), y, linestyle="", color=ink, clip_on=False, **FORMS[who])


def scaled(ax: Axes, bound: float, right: float, label: str) -> None:
    """A grid line at every power of ten, and a number at every other one."""
    ax.axvline(bound, color=GREY.light, linewidth=1, linestyle="--")
    ax.set(xscale="log", xlim=(LEFT, right), xlabel=label)
    named = {-8: "0", -6: "$10^{-6}$", -4: "$10^{-4}$", -2: "$10^{-2}$", 0: "1"}
    powers = [power for power in range(-8, 2) if 10.0**power <= right]
    ax.set_xticks([10.0**power for power in powers], [named.get(power, "") for power in powers])
    ax.minorticks_off()


def labelled(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0, pad=7)
    ax.grid(axis="y", visible=False)


def legend(figure: Figure, who: Sequence[str], bound: float) -> None:
    ax = Figure().subplots()
    handles: list[Line2D] = []
    for name in who:
        dot(ax, 1.0, 0, name)
        handles.append(ax.lines[-1])
        handles[-1].set_label(NAMES[name])
    handles.append(Line2D([], [], color=GREY.light, linewidth=1, linestyle="--", label=f"equal up to {bound:g}"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), borderaxespad=0)
