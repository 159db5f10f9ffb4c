"""Bars and lines as SVG, in the style of the pages of runs: colours are the page's own (`page.css`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from ..pages.svg import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, path, ruled
from ..pages.thin import ticks

ROW, BAR = 40, 12
BOTTOM = 40


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
    x, y = Scale(0, max(len(points) - 1, 1), LEFT, WIDTH - RIGHT), Scale(0, most, HEIGHT - BOTTOM, TOP)
    curve = np.arange(len(points), dtype=float), np.array([point.value for point in points])
    places = list(zip(x(curve[0]).tolist(), y(curve[1]).tolist(), strict=True))
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    out += ruled(y, ticks(0, most, 4))
    apart = math.ceil(len(points) * 46 / (WIDTH - RIGHT - LEFT))
    for point, (at, _) in list(zip(points, places, strict=True))[::apart]:
        out.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(point.label)}</text>')
    out.append(f'<text class="soft" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">micro_batch_tokens</text>')
    out.append(f'<path class="line s{colour}" d="{path(curve, x, y)}"/>')
    for point, (at, up) in zip(points, places, strict=True):
        out.append(f'<circle class="column s{colour}" cx="{at:.1f}" cy="{up:.1f}" r="{6 if point.marked else 3}"/>')
    return Markup("".join(out) + "</svg>")
