"""Curves with bands over seeds, the frontier of a metric against KL, and intervals, in the style of all pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

from ..pages.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    Scale,
    colour_of,
    frame,
    numbered,
    path,
    picture,
    ruled,
)
from ..pages.thin import ticks
from ..pages.words import number
from .intervals import Comparison
from .outcome import Line as RunLine
from .scores import METRICS

ROW, ABOVE = 44, 6
Runs = Mapping[str, Sequence[RunLine]]


def over_seeds(runs: Sequence[RunLine], metric: str, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """(what was spent [checks], values [seeds, checks]), at the places of the first run's checks."""
    x = np.array([point[unit] for point in runs[0]["curve"]], dtype=float)
    rows = []
    for run in runs:
        own = np.array([point[unit] for point in run["curve"]], dtype=float)
        rows.append(np.interp(x, own, np.array([point[metric] for point in run["curve"]], dtype=float)))
    return x, np.array(rows)


def curves(title: str, runs: Runs, metric: str, unit: str) -> Markup:
    """A line for each contestant, the mean of its seeds, in a band from the lowest to the highest of them."""
    lines, bands = [], []
    for colour, (name, those) in enumerate(runs.items()):
        x, y = over_seeds(those, metric, unit)
        lines.append(Line(name, colour, (x, y.mean(0))))
        bands.append((colour, x, y.min(0), y.max(0)))
    scale = [(x, edge) for _, x, low, high in bands for edge in (low, high)]
    scales = frame(scale, False, [[int(step) for step in x] for _, x, _, _ in bands])
    return picture(title, lines, bands, scales)


def frontier(runs: Runs, metric: str) -> Markup:
    """The metric against KL: each contestant's way there, its seeds' mean, and a dot for the end of each seed."""
    ways, ends = {}, {}
    for name, those in runs.items():
        count = min(len(run["curve"]) for run in those)
        table = np.array([[(point["kl"], point[metric]) for point in run["curve"][:count]] for run in those])
        ways[name] = table.mean(0)
        ends[name] = np.array([[(run["curve"][-1][one]) for one in ("kl", metric)] for run in those])
    every = np.concatenate([*ways.values(), *ends.values()])
    (left, low), (right, high) = every.min(0), every.max(0)
    wide, tall = 0.04 * (right - left) or 1.0, 0.05 * (high - low) or 1.0
    x = Scale(min(left, 0.0), right + wide, LEFT, WIDTH - RIGHT)
    y = Scale(low - tall, high + tall, HEIGHT - BOTTOM - 14, TOP)
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(metric)} against KL">']
    out += [*ruled(y, ticks(y.low, y.high, 4)), *numbered(x, ticks(x.low, x.high, 5), y.start + 16)]
    out.append(
        f'<text class="soft" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">KL, nats a completion</text>'
    )
    for colour, name in enumerate(runs):
        way = (ways[name][:, 0], ways[name][:, 1])
        out.append(f'<path class="line {colour_of(colour)}" d="{path(way, x, y)}"/>')
        for kl, value in ends[name]:
            at = float(x(np.array(kl))), float(y(np.array(value)))
            out.append(f'<circle class="column {colour_of(colour)}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4.5"/>')
    return Markup("".join(out) + "</svg>")


def intervals(metric: str, comparisons: Sequence[Comparison]) -> Markup:
    """A row for each comparison: the difference and its interval, beside 0."""
    ends = [0.0, *(end for one in comparisons for end in (one.difference.low, one.difference.high))]
    pad = 0.04 * (max(ends) - min(ends)) or 1.0
    x, height = Scale(min(ends) - pad, max(ends) + pad, 4, WIDTH - 4), ABOVE + ROW * len(comparisons) + 22
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="differences in {escape(metric)}">']
    places = ticks(x.low, x.high, 5)
    for value in places:
        at = float(x(np.array(value)))
        out.append(f'<path class="{"zero" if value == 0 else "grid"}" d="M{at:.1f} 2V{height - 18}"/>')
    out += numbered(x, places, height - 4)
    for row, one in enumerate(comparisons):
        top, difference = ABOVE + ROW * row, one.difference
        low, middle, high = (float(x(np.array(v))) for v in (difference.low, difference.mean, difference.high))
        better = METRICS[metric].better * difference.sign
        shade = "s9" if not difference.sign else "s0" if not better else "s2" if better > 0 else "s1"
        out.append(f'<text x="0" y="{top + 14}">{escape(one.first)} − {escape(one.second)}</text>')
        out.append(f'<text x="{WIDTH}" y="{top + 14}" text-anchor="end">{signed(difference.mean)}</text>')
        out.append(f'<path class="interval {shade}" d="M{low:.1f} {top + 28}H{high:.1f}"/>')
        out.append(f'<circle class="column {shade}" cx="{middle:.1f}" cy="{top + 28}" r="5"/>')
    return Markup("".join(out) + "</svg>")


def signed(value: float) -> str:
    """With its sign, three digits."""
    return ("+" if value > 0 else "−" if value < 0 else "") + number(abs(value), 3)
