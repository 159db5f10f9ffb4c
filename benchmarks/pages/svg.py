"""A chart as an SVG that takes its colours from the page: lines of several runs over one axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape

from logratio.benchmarks.reporting.palette import SERIES

from .charts import EVALUATED, Chart
from .runs import Run
from .thin import POINTS, Curve, decades, means, thinned, ticks
from .words import number, tick_labels

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 10, 26
ALL_POINTS = 100_000
"""Of all curves of a page together: about a megabyte."""
FEWEST = 40
BANDS = 3
"""Runs up to which their bands are drawn; more would hide each other."""
MANY = 4
"""Lines from which on those of single steps are paler."""
LOGARITHMIC = 100.0
"""Times the lowest value that the highest must have for a logarithmic scale."""


@dataclass
class Line:
    """label: what the read-out calls it. kind: "line", "dashed" or "dots"; faint: that another line tells its mean."""

    label: str
    colour: int
    curve: Curve
    kind: str = "line"
    faint: bool = False
    silent: bool = False  # not in the read-out


@dataclass
class Drawing:
    """What a figure of the page shows. keys: (kind, colour, text) of its legend. last: the last value, of one run."""

    title: str
    note: str
    svg: Markup
    keys: list[tuple[str, int, str]] = field(default_factory=list)
    last: str = ""


@dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.log(values / self.low) / math.log(self.high / self.low) if self.log else (
                (values - self.low) / (self.high - self.low)
            )  # fmt: skip
        return self.start + at * (self.end - self.start)


def points_for(curves: int) -> int:
    """Points of each of so many curves."""
    return min(POINTS, max(FEWEST, ALL_POINTS // max(curves, 1)))


def colour_of(number: int) -> str:
    """The class of a line; from the eleventh on, dashed besides."""
    return f"s{number % len(SERIES)}" + (" again" if number >= len(SERIES) else "")


def drawn(chart: Chart, runs: Sequence[Run], points: int = POINTS) -> Drawing:
    """The chart of one run, whose lines have a colour each, or of several, which have one each."""
    lines, bands, keys = [], [], []
    log = chart.log and is_wide([run.columns[name].values for run in runs for name in chart.all & run.columns.keys()])
    several = len(runs) > 1
    for at, run in enumerate(runs):
        for place, name in enumerate(chart.metrics):
            colour = at if several else 2 * place
            short = name.rsplit("/", 1)[-1]
            own = short if len(chart.metrics) > 1 else ""
            label = " ".join(filter(None, [run.name if several else "", own])) or "training"
            kind = "dashed" if several and place else "line"
            if (column := run.columns.get(name)) is not None:
                mean = means(column.steps, column.values, log=log) if chart.noisy else None
                curve = thinned(column.steps, column.values, points)
                lines.append(Line(label, colour, curve, kind, faint=mean is not None))
                if mean is not None:
                    lines.append(Line(label, colour, mean, kind, silent=True))
                keys += [(kind, colour, own or "training")] if not several else []
            if (column := run.columns.get(EVALUATED + name)) is not None:
                over = colour if several else colour + 1
                curve = thinned(column.steps, column.values, points)
                lines.append(Line(f"{label}, evaluation" if several or own else "evaluation", over, curve, "dots"))
                keys += [("dots", over, f"{own}, evaluation" if own else "evaluation")] if not several else []
        if (band := band_of(chart, run, points)) is not None:
            bands.append((at, *band))
    bands = bands if len(bands) <= BANDS else []
    scale = [line.curve for line in lines] + [(x, edge) for _, x, low, high in bands for edge in (low, high)]
    last = runs[0].last(chart.metrics[0]) if not several and len(chart.metrics) == 1 else None
    notes = [chart.note, f"band: {chart.edges}" if bands and chart.edges else ""]
    if several and len(chart.metrics) > 1:
        notes.append("dashed: " + chart.metrics[1].rsplit("/", 1)[-1])
    notes.append("logarithmic" if log else "")
    return Drawing(
        chart.title,
        "; ".join(filter(None, notes)),
        picture(chart.title, lines, bands, frame(scale, log, [c.steps for run in runs for c in run.columns.values()])),
        keys if len(keys) > 1 else [],
        number(last) if last is not None else "",
    )


def band_of(chart: Chart, run: Run, points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(steps, lower, upper edge) of the chart's band; None where the log has none."""
    names = chart.band or ((chart.metrics[0], chart.spread) if chart.spread else ())
    columns = [run.columns[name] for name in names if name in run.columns]
    if len(columns) != 2:
        return None
    shared, one, other = np.intersect1d(columns[0].steps, columns[1].steps, return_indices=True)[:3]
    low, high = np.asarray(columns[0].values)[one], np.asarray(columns[1].values)[other]
    if chart.band is None:
        low, high = low - high, low + high
    finite = np.isfinite(low) & np.isfinite(high)
    shared, low, high = shared[finite].astype(float), low[finite], high[finite]
    if len(shared) < 2:
        return None
    width = -(-len(shared) // (points // 2))  # the widest of each stretch
    starts = np.arange(0, len(shared), width)
    return shared[starts], np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)


def is_wide(columns: Sequence[Sequence[float]]) -> bool:
    """Whether all values are positive and of very different size."""
    values = np.concatenate([np.asarray(values) for values in columns]) if columns else np.empty(0)
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > LOGARITHMIC * values.min())


def frame(curves: Sequence[Curve], log: bool, steps: Sequence[Sequence[int]]) -> tuple[Scale, Scale]:
    """The scales of steps, the same in all charts of a page, and of values, which holds all curves. steps: of all
    metrics of all runs, in order."""
    values = np.concatenate([y[np.isfinite(y)] for _, y in curves] or [np.zeros(1)])
    first, last = float(min(one[0] for one in steps if one)), float(max(one[-1] for one in steps if one))
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if log:
        low, high = low / 1.15, high * 1.15
    else:
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = (0.0 if 0 <= low < 0.35 * high else low - pad), high + pad
        if low < 0 <= low + pad:
            low = 0.0
    wide = (first, last) if last > first else (first - 1, last + 1)
    return Scale(*wide, LEFT, WIDTH - RIGHT), Scale(low, high, HEIGHT - BOTTOM, TOP, log)


def picture(
    title: str,
    lines: Sequence[Line],
    bands: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]],
    scales: tuple[Scale, Scale],
) -> Markup:
    """The SVG. What the read-out needs stands in data-attributes: the scales, and the names of the lines."""
    x, y = scales
    out = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by step" '
        f'data-x="{x.low:.12g} {x.high:.12g} {x.start} {x.end}" '
        f'data-y="{y.low:.12g} {y.high:.12g} {y.start} {y.end} {int(y.log)}">'
    ]
    heights = decades(y.low, y.high) if y.log else ticks(y.low, y.high, 4)
    places = [step for step in ticks(max(x.low, 0), x.high, 5) if step == round(step)]
    out += [*ruled(y, heights), *numbered(x, places, HEIGHT - 8)]
    for colour, steps, low, high in bands:
        around = (np.concatenate([steps, steps[::-1]]), np.concatenate([high, low[::-1]]))
        out.append(f'<path class="band {colour_of(colour)}" d="{path(around, x, y)}Z"/>')
    for line in sorted(lines, key=lambda line: not line.faint):  # the means above all single steps
        d = path(line.curve, x, y)
        faint = f" faint {'among' if len(lines) > MANY else ''}".rstrip() if line.faint else ""
        named = "" if line.silent else f' data-label="{escape(line.label)}"'
        out.append(f'<path class="{line.kind}{faint} {colour_of(line.colour)}"{named} d="{d}"/>')
        if line.kind == "dots" or len(line.curve[0]) == 1:
            apart = d.replace("h0", "").replace("L", "M").replace("M", "h0M").removeprefix("h0") + "h0"
            out.append(f'<path class="dot {colour_of(line.colour)}" d="{apart}"/>')
    return Markup("".join(out) + "</svg>")


def ruled(y: Scale, heights: Sequence[float]) -> list[str]:
    """Lines behind a figure, each with its number."""
    out = []
    for value, label in zip(heights, tick_labels(heights), strict=True):
        at = float(y(np.array(value)))
        out.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    return out


def numbered(x: Scale, places: Sequence[float], below: float) -> list[str]:
    """The numbers under a figure."""
    labels = zip(places, tick_labels(places), strict=True)
    return [
        f'<text x="{float(x(np.array(v))):.1f}" y="{below:g}" text-anchor="middle">{label}</text>'
        for v, label in labels
    ]


def path(curve: Curve, x: Scale, y: Scale) -> str:
    """Lines between the points that have a value; after a gap a new one begins. Each begins with a point of no length,
    which a single value is seen by."""
    out, gap = [], True
    for left, up in zip(x(curve[0]).tolist(), y(curve[1]).tolist(), strict=True):
        if math.isfinite(up):
            out.append(f"M{left:.1f} {up:.2f}h0" if gap else f"L{left:.1f} {up:.2f}")
        gap = not math.isfinite(up)
    return "".join(out)
