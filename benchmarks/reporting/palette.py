"""The colours of plots and pages: after Okabe and Ito, told apart with any colour vision.

Each has a form for light and one for dark ground; both have a contrast of at least 3 to 1 with it, as lines and large
type need.
"""

from __future__ import annotations

from typing import NamedTuple


class Hue(NamedTuple):
    light: str
    dark: str


BLUE = Hue("#0072B2", "#4BA3DB")
VERMILION = Hue("#D55E00", "#EE7733")
GREEN = Hue("#00805E", "#2BB38A")
PURPLE = Hue("#B8588F", "#DD93BD")
OCHRE = Hue("#B57A00", "#E6A91E")
SKY = Hue("#2F8FC4", "#8CCBF0")
GREY = Hue("#6B6B6B", "#A3A3A3")
INDIGO = Hue("#332288", "#9C8FE8")
WINE = Hue("#882255", "#D4689A")
OLIVE = Hue("#7A7A1F", "#BDBD55")

SERIES = (BLUE, VERMILION, GREEN, PURPLE, OCHRE, INDIGO, SKY, WINE, OLIVE, GREY)
"""In the order in which lines of one plot take them."""
GRID = Hue("#E4E4E4", "#2C333B")
