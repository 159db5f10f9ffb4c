"""Bars and lines as SVG, in the style of the pages of runs: colours are the page's own (`page.css`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from ..pages.thin import ticks
from ..pages.words import tick

WIDTH = 420
ROW, BAR = 40, 12
LEFT, RIGHT, TOP, BOTTOM, HEIGHT = 50, 16, 10, 40, 236


@dataclass(frozen=True)
class Bar:
    """told: the value as it is written. low, high: how far it spreads."""

    name: str
    value: float
    told: str
    colour: int = 0
    low: float | None = None
    high: float | None = None


def bars(title: str, rows: Sequence[Bar]) -> Markup:
    """One below the other, from 0 on, each under its name and value."""
    most = max([row.high or row.value for row in rows] + [1e-12])
    scale = (WIDTH - 2) / most
    height = ROW * len(rows)
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for at, row in enumerate(rows):
        top = ROW * at
        out.append(f'<text x="0" y="{top + 14}">{escape(row.name)}</text>')
        out.append(f'<text x="{WIDTH}" y="{top + 14}" text-anchor="end">{escape(row.told)}</text>')
        out.append(
            f'<rect class="column s{row.colour}" x="0" y="{top + 20}" width="{max(row.value * scale, 1):.1f}" '
            f'height="{BAR}" rx="2"/>'
        )
        if row.low is not None and row.high is not None:
            middle = top + 20 + BAR / 2
            out.append(f'<path class="spread" d="M{row.low * scale:.1f} {middle}H{row.high * scale:.1f}"/>')
    return Markup("".join(out) + "</svg>")


@dataclass(frozen=True)
class Point:
    """label: at the axis. marked: drawn larger."""

    label: str
    value: float
    marked: bool = False


def steps(title: str, points: Sequence[Point], colour: int = 0) -> Markup:
    """A line over points that are evenly apart, its values from 0 on."""
    most = max(point.value for point in points) * 1.08 or 1.0
    across = (WIDTH - RIGHT - LEFT) / max(len(points) - 1, 1)
    places = [
        (LEFT + across * i, HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * p.value / most) for i, p in enumerate(points)
    ]
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value in ticks(0, most, 4):
        y = HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / most
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick(value)}</text>')
    apart = math.ceil(len(points) * 46 / (WIDTH - RIGHT - LEFT))
    for i, (point, (x, _)) in enumerate(zip(points, places, strict=True)):
        if i % apart == 0:
            out.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(point.label)}</text>'
            )
    out.append(f'<text class="soft" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">micro_batch_tokens</text>')
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    out.append(f'<path class="line s{colour}" d="M{line}"/>')
    for point, (x, y) in zip(points, places, strict=True):
        out.append(f'<circle class="column s{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{6 if point.marked else 3}"/>')
    return Markup("".join(out) + "</svg>")
