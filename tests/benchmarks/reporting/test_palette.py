"""The colours of plots and pages can be seen on their ground, and the first six told apart with any colour vision."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from logratio.benchmarks.reporting.palette import COLOURS, OTHERS, PARTS, SERIES

GROUND = {"light": ("#FFFFFF", "#F6F7F9"), "dark": ("#14181D", "#1B2027")}
# What is left of linear RGB in full protanopia, deuteranopia, tritanopia: Machado, Oliveira and Fernandes 2009, table 1
VISION = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = XYZ.sum(1)


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB."""
    part = XYZ @ rgb.clip(0, 1) / WHITE
    root = np.where(part > (6 / 29) ** 3, np.cbrt(part), part / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(XYZ[1] @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("ground", GROUND)
def test_a_line_can_be_seen(ground: str):
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    for hue in SERIES:
        for behind in GROUND[ground]:
            assert contrast(getattr(hue, ground), behind) >= 3, (hue, behind)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("ground", GROUND)
def test_six_lines_can_be_told_apart(ground: str, vision: str):
    seen = [lab(np.array(VISION[vision]) @ linear(getattr(hue, ground))) for hue in SERIES[:6]]
    for one, other in itertools.combinations(seen, 2):
        assert np.linalg.norm(one - other) >= 10


def test_no_part_and_no_two_contestants_share_a_colour():
    assert len(set(PARTS)) == len(PARTS) and not set(PARTS) & {*COLOURS.values(), *OTHERS}
    assert len(set(COLOURS.values())) == len(COLOURS) - 1  # ours without a kernel's name, and with it
