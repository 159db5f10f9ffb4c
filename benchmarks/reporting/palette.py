"""The colours of plots and pages, near those of Okabe and Ito.

Each has a form for light and one for dark ground, with a contrast of at least 3 to 1, as lines need. The first six of
`SERIES` are told apart with any colour vision.
"""

from __future__ import annotations

from typing import NamedTuple
from zlib import crc32


class Hue(NamedTuple):
    light: str
    dark: str


BLUE = Hue("#0674B7", "#6091C5")
VERMILION = Hue("#B54D01", "#EE7733")
GREEN = Hue("#059F73", "#2BB38A")
PURPLE = Hue("#B9749F", "#DD93BD")
OCHRE = Hue("#BF8200", "#F2BE3D")
INDIGO = Hue("#2C2085", "#8F7DE0")
SKY = Hue("#3D94C9", "#8CCBF0")
WINE = Hue("#882255", "#D4689A")
OLIVE = Hue("#7A7A1F", "#BDBD55")
GREY = Hue("#6B6B6B", "#A3A3A3")

SERIES = (BLUE, VERMILION, GREEN, PURPLE, OCHRE, INDIGO, SKY, WINE, OLIVE, GREY)
"""In the order in which lines of one plot take them."""
GRID = Hue("#E4E4E4", "#2C333B")

COLOURS = {
    "logratio": BLUE.light,
    "logratio (two_gemm)": BLUE.light,
    "logratio (triton)": SKY.light,
    "trl": VERMILION.light,
    "trl+liger": OCHRE.light,
    "liger": PURPLE.light,
    "torch": GREEN.light,
    "eager": GREY.light,
}
"""Of the contestants of a benchmark; its plots are on white."""
OTHERS = (INDIGO.light, WINE.light, OLIVE.light)
PARTS = ("#4477AA", "#88CCEE", "#EE8866", "#BBCC33", "#FFAABB", "#AAAA00", "#DDDDDD", "#99DDFF")
"""Of what a step consists of, side by side in one bar; none is a contestant's."""


def colour(contestant: str) -> str:
    """Its own in every plot; a name that is not in the table has one by its letters."""
    return COLOURS.get(contestant) or OTHERS[crc32(contestant.encode()) % len(OTHERS)]
