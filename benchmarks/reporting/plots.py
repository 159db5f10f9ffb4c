"""The plots of benchmarks/README.md: steps beside peers, scaling, where the time goes, predicted memory.

Every image tells its device, commit, versions and lines at its foot. The same records make the same bytes.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .palette import GRID, PARTS, colour
from .rows import SAID, Row, bases, contestants, groups, lines_of, named, quotient

MARKERS = {"full": "s", "lora": "o", "qlora": "^"}
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID.light,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": 150,
}
WIDTH = 8.0
MEMORY = {"peak_mem_mib": "peak memory (GiB)", "saved_mib": "kept by autograd (GiB)"}


@dataclass(frozen=True)
class Plot:
    """An image that was made. suite: of whose section it is; empty: of the whole device."""

    file: str
    device: str
    suite: str
    title: str
    rows: Sequence[Row]


def draw(rows: Sequence[Row], folder: Path) -> list[Plot]:
    """Write every plot that these rows have the numbers for."""
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Plot] = []

    def keep(figure: Figure | None, title: str, kind: str, suite: str, of: Sequence[Row]) -> None:
        if figure is None:
            return
        device = of[0]["device"]
        file = re.sub(r"[^a-z0-9.]+", "-", f"{device} {suite} {kind} {title}".lower()).strip("-") + ".png"
        plot = Plot(file, device, suite, f"{title}: {kind}", of)
        finish(figure, plot, folder)
        made.append(plot)

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        for _, of_device in groups(rows, "device").items():
            for (suite,), of_suite in groups(of_device, "suite").items():
                if suite == "step":
                    for key, group in groups(of_suite, "model", "adapter", "workload").items():
                        keep(peers(group), named(key), " and ".join(kinds(group)), suite, group)
                        keep(parts(group), named(key), "where the time goes", suite, group)
                if suite == "scale":
                    for key, group in groups(of_suite, "model", "adapter", "workload", "method", "axis").items():
                        keep(curves(group), named(key), "scaling", suite, group)
            foreseen = [row for row in of_device if row.get("predicted_peak_mem_mib") and row.get("peak_mem_mib")]
            keep(prediction(foreseen), "Peak memory", "predicted and measured", "", foreseen)
    return made


def absolute(rows: Sequence[Row]) -> bool:
    return bool(rows[0]["gpu"] != "cpu")


def finish(figure: Figure, plot: Plot, folder: Path) -> None:
    """Title, foot and file. Software and date are left out of the file, so that equal images are equal bytes."""
    certificates = [row["certificate"] for row in plot.rows]
    texts = [
        plot.device,
        *sorted({f"commit {c.get('commit')}" for c in certificates}),
        *sorted({str(c.get("command")) for c in certificates}),
        *sorted({f"{name} {v}" for c in certificates for name, v in (c.get("versions") or {}).items()}),
        lines_of(plot.rows),
    ]
    titled(figure, plot.title, texts)
    figure.savefig(folder / plot.file, format="png", metadata={"Software": None})


def titled(figure: Figure, title: str, texts: Sequence[str]) -> None:
    """texts: what its foot says."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    foot = "\n".join(textwrap.wrap("; ".join(texts), width=int(figure.get_figwidth() * 21)))
    figure.supxlabel(foot, x=0.01, ha="left", fontsize=6, color="#666666")


def panels_of(rows: Sequence[Row], time: str) -> list[tuple[str, str]]:
    """(field, label) of what was measured: time, and memory, of a CPU what autograd keeps. time: its label."""
    known = {key for row in rows if row["status"] == "ok" for key in ("step_ms_p50", *MEMORY) if row.get(key)}
    memory = [(key, label) for key, label in MEMORY.items() if key in known][:1]
    return ([("step_ms_p50", time)] if "step_ms_p50" in known else []) + memory


def kinds(rows: Sequence[Row]) -> list[str]:
    """What a plot of these rows shows, for its title."""
    return ["memory" if key in MEMORY else "step time" for key, _ in panels_of(rows, "")]


def peers(rows: Sequence[Row]) -> Figure | None:
    """Grouped bars, a group for each method: time above, memory below, with the ratio to ours on each peer's bar."""
    panels = panels_of(rows, "step time (ms, p50)" if absolute(rows) else "step time / ours")
    if not panels:
        return None
    cases = groups(rows, "method", "case")
    several = len({case for _, case in cases}) > len({method for method, _ in cases})
    figure, axes = blank(len(panels))
    for ax, (key, label) in zip(axes, panels, strict=True):
        bars(ax, rows, [case for _, case in cases], key)
        ax.set_ylabel(label)
        ax.set_xticks(range(len(cases)), [case if several else str(method) for method, case in cases])
        ax.tick_params(axis="x", length=0, rotation=30 if several else 0)
        ax.grid(axis="x", visible=False)
    handles = [Patch(color=colour(name), label=name) for name in contestants(rows)]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def bars(ax: Axes, rows: Sequence[Row], cases: Sequence[str], key: str) -> None:
    """One bar for each case and contestant; what has no number is written where its bar would stand."""
    names, ours = contestants(rows), bases(rows)
    width = 0.8 / len(names)
    for row in rows:
        base = ours.get(row["case"])
        x = cases.index(row["case"]) + (names.index(row["contestant"]) - (len(names) - 1) / 2) * width
        ratio = quotient(row, base, key)
        unit = 1 / 1024 if key in MEMORY else 1.0
        height = ratio if key.startswith("step") and not absolute(rows) else (row.get(key) or 0) * unit
        ink = colour(row["contestant"])
        if row["status"] != "ok":
            ax.annotate(
                SAID[row["status"]], (x, 0), (0, 3), textcoords="offset points", rotation=90, ha="center", color=ink
            )
        elif height:
            ax.bar(x, height, 0.92 * width, color=ink)
            low, high = row.get("step_ms_p20"), row.get("step_ms_p80")
            if key == "step_ms_p50" and low and high:
                scale = height / row[key]
                ax.errorbar(x, height, [[height - low * scale], [high * scale - height]], color="#333333", linewidth=1)
                height = max(height, high * scale)
            if ratio and row is not base:
                ax.annotate(
                    f"{ratio:.2f}×", (x, height), (0, 2), textcoords="offset points", ha="center", fontsize=7
                )  # fmt: skip
    ax.margins(y=0.12)
    ax.set_xlim(-0.5, len(cases) - 0.5)


def curves(rows: Sequence[Row]) -> Figure | None:
    """Time and memory along an axis, a line for each contestant; an x where it ran out of memory."""
    measured = [row for row in rows if row["status"] == "ok"]
    panels = panels_of(rows, "step time (ms, p50)")
    if not panels:
        return None
    figure, axes = blank(len(panels))
    values = sorted({row["value"] for row in rows})
    lost = [row for row in rows if row["status"] == "oom"]
    for ax, (key, label) in zip(axes, panels, strict=True):
        unit = 1 / 1024 if key in MEMORY else 1.0
        if key == "step_ms_p50" and not absolute(rows):
            smallest = [row for row in sorted(bases(rows).values(), key=lambda row: row["value"]) if row.get(key)]
            if not smallest:
                continue
            unit, label = 1 / smallest[0][key], f"step time / ours at {smallest[0]['value']:,}"
        for name in contestants(rows):
            mine = [row for row in measured if row["contestant"] == name and row.get(key)]
            points = sorted((row["value"], row[key] * unit) for row in mine)
            ax.plot(*zip(*points, strict=True) if points else ([], []), "o-", color=colour(name), markersize=4)
        for name, row in [(name, row) for name in contestants(lost) for row in lost if row["contestant"] == name]:
            height = 0.97 - 0.07 * contestants(lost).index(name)
            ax.plot(
                row["value"], height, "x", color=colour(name), markersize=7, markeredgewidth=2,
                transform=ax.get_xaxis_transform(),
            )  # fmt: skip
        scaled(ax, values, [row[key] for row in measured if row.get(key)], 0.1 * len(contestants(lost)))
        ax.set_ylabel(label)
    axes[-1].set_xlabel(str(rows[0]["axis"]).replace("_", " "))
    handles = [Line2D([], [], marker="o", markersize=4, color=colour(name), label=name) for name in contestants(rows)]
    if lost:
        handles.append(
            Line2D([], [], marker="x", linestyle="", color="#333333", markeredgewidth=2, label="out of memory")
        )  # fmt: skip
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def plain(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_locator(NullLocator())


def scaled(ax: Axes, values: Sequence[float], heights: Sequence[float], room: float) -> None:
    """Logarithms where values span a factor of four; ticks at the values. room: share of the height to leave free."""
    if values[0] > 0 and values[-1] >= 4 * values[0]:
        ax.set_xscale("log", base=2)
    if heights and max(heights) >= 4 * min(heights):
        ax.set_yscale("log")
        plain(ax.yaxis)
    else:
        ax.set_ylim(bottom=0)
    ax.margins(y=0.1)
    low, high = ax.get_ylim()
    ax.set_ylim(top=high * (high / low) ** room if ax.get_yscale() == "log" else high * (1.08 + room))
    ax.set_xticks(values, [f"{value:,}" for value in values])
    ax.xaxis.set_minor_locator(NullLocator())


def parts(rows: Sequence[Row]) -> Figure | None:
    """A bar for each contestant of each method, stacked of what its step consists of."""
    told = [row for row in rows if row["status"] == "ok" and row.get("parts")]
    if not told:
        return None
    told = [row for group in groups(told, "method", "case", "contestant").values() for row in group]
    names = list(dict.fromkeys(name for row in told for name in row["parts"]))
    figure = Figure(figsize=(WIDTH, 1.7 + 0.32 * len(told)), layout="constrained")
    ax = figure.subplots()
    for y, row in enumerate(told):
        left = 0.0
        scale = 1.0 if absolute(rows) else 100 / sum(filter(None, row["parts"].values()))
        for name in names:
            width = (row["parts"].get(name) or 0.0) * scale
            ax.barh(y, width, 0.7, left=left, color=PARTS[names.index(name) % len(PARTS)])
            left += width
    several = len({row["case"] for row in told}) > len({row["method"] for row in told})
    labels = [f"{row['case'] if several else row['method']}, {row['contestant']}" for row in told]
    ax.set_yticks(range(len(told)), labels)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("ms of a step" if absolute(rows) else "% of a step")
    handles = [Patch(color=PARTS[i % len(PARTS)], label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def prediction(rows: Sequence[Row]) -> Figure | None:
    """Predicted over measured peak memory; the band is 10 % to either side."""
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH * 0.7, WIDTH * 0.6), layout="constrained")
    ax = figure.subplots()
    points = [(row["peak_mem_mib"] / 1024, row["predicted_peak_mem_mib"] / 1024) for row in rows]
    ends = [min(min(p) for p in points) / 1.3, max(max(p) for p in points) * 1.3]
    ax.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="#DDDDDD", linewidth=0)
    ax.plot(ends, ends, color="#999999", linewidth=1)
    for row, (x, y) in zip(rows, points, strict=True):
        ink, marker = colour(row["contestant"]), MARKERS.get(row.get("adapter") or "", "D")
        ax.plot(x, y, marker, color=ink, markersize=5, markeredgecolor="white", markeredgewidth=0.5)
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        plain(axis)
    ax.set_xlabel("measured (GiB)")
    ax.set_ylabel("predicted (GiB)")
    adapters = [name for (name,) in groups(rows, "adapter")]
    handles: list[Any] = [Patch(color=colour(name), label=name) for name in contestants(rows)]
    handles += [
        Line2D([], [], marker=MARKERS.get(name or "", "D"), linestyle="", color="#555555", label=str(name))
        for name in adapters
    ]
    handles.append(Patch(color="#DDDDDD", label="±10 %"))
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def blank(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, one below the other."""
    figure = Figure(figsize=(WIDTH, 1.2 + 2.4 * panels), layout="constrained")
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])
