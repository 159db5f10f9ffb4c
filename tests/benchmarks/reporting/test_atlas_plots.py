"""The plots of the atlas: a dot for every number, at its place, in the row that names it; and they are the page's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from logratio.benchmarks.peers.text import markdown
from logratio.benchmarks.reporting import atlas_plots
from logratio.benchmarks.reporting.palette import COLOURS

DOCS = Path(__file__).parents[3] / "docs"


def variant(name: str, peer: str, loss: float, gradient: float, verdict: str = "equal") -> dict[str, Any]:
    row = {"variant": name, "peer": peer, "verdict": verdict, "reason": "" if verdict == "equal" else "why"}
    return row if verdict == "refused" else row | {"loss_rel_err": loss, "grad_rel_err": gradient}


ATLAS: dict[str, Any] = {
    "command": "logratio atlas",
    "versions": {"trl": "1.16.0"},
    "batch": 8,
    "parts": 4,
    "equal": 1e-4,
    "variants": [
        variant("dpo hinge", "trl", 0.0, 2e-7),
        variant("dpo ipo", "trl", 3e-7, 4e-7),
        variant("dpo ipo", "liger", 0.5, 0.6, "different"),
        variant("kto kto", "trl", 5e-7, 6e-7),
        variant("kto kto", "liger", 0.0, 0.0, "refused"),
    ],
    "splits": [
        {"variant": "dpo hinge", "ours": 2e-7, "trl": 3e-7, "reasons": {}},
        {"variant": "kto kto", "ours": 4e-7, "trl": 0.02, "reasons": {"trl": "why"}},
        {"variant": "dpo ipo", "ours": 6e-7, "trl": 7e-7, "liger": 0.3, "reasons": {"liger": "why"}},
        {"variant": "sft nll", "ours": 8e-7, "reasons": {}},
    ],
    "faults": [],
}


def names(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def dots(ax: Axes) -> set[tuple[int, float, Any]]:
    """(row, value, colour) of all that is no line."""
    drawn = [line for line in ax.lines if line.get_linestyle() == "None"]
    return {(int(line.get_ydata()[0]), float(line.get_xdata()[0]), line.get_color()) for line in drawn}  # type: ignore[index]


def bounds(figure: Figure) -> list[float]:
    dashed = [line for ax in figure.axes for line in ax.lines if line.get_linestyle() == "--"]
    return [float(line.get_xdata()[0]) for line in dashed]  # type: ignore[index]


TRL, LIGER, OURS = COLOURS["trl"], COLOURS["liger"], COLOURS["logratio"]


def test_every_error_has_a_dot_in_the_row_of_its_method_and_peer():
    figure = atlas_plots.errors(ATLAS)
    loss, gradient = figure.axes
    assert names(figure) == ["DPO, TRL", "DPO, Liger", "KTO, TRL"]
    zero = atlas_plots.LEFT  # which has no logarithm
    assert dots(loss) == {(0, zero, TRL), (0, 3e-7, TRL), (1, 0.5, LIGER), (2, 5e-7, TRL)}
    assert dots(gradient) == {(0, 2e-7, TRL), (0, 4e-7, TRL), (1, 0.6, LIGER), (2, 6e-7, TRL)}
    assert [ax.get_xlabel() for ax in figure.axes] == list(atlas_plots.ERRORS.values())
    assert bounds(figure) == [1e-4, 1e-4]


def test_what_a_split_moves_most_stands_first_and_what_it_does_not_in_one_row():
    figure = atlas_plots.splits(ATLAS)
    (ax,) = figure.axes
    assert names(figure) == ["dpo ipo", "kto kto", "the other 2 variants"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first row is the upper one"
    moved = {(0, 6e-7, OURS), (0, 7e-7, TRL), (0, 0.3, LIGER), (1, 4e-7, OURS), (1, 0.02, TRL)}
    assert dots(ax) == moved | {(2, 2e-7, OURS), (2, 3e-7, TRL), (2, 8e-7, OURS)}
    assert bounds(figure) == [1e-4]


def test_no_number_of_the_atlas_is_out_of_sight():
    stored = json.loads((DOCS / "atlas.json").read_text())
    for figure in (atlas_plots.errors(stored), atlas_plots.splits(stored)):
        for ax in figure.axes:
            low, high = ax.get_xlim()
            assert all(low <= value <= high for _, value, _ in dots(ax))


def test_the_images_are_of_a_readable_size_with_something_on_them(tmp_path):
    atlas_plots.draw(ATLAS, tmp_path / "docs")
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == sorted(atlas_plots.FILES)
    for file in atlas_plots.FILES:
        image = imread(tmp_path / "docs" / file)[:, :, :3]
        height, width, _ = image.shape
        assert 700 < width < 1600 and 200 < height < 1400 and (image < 0.97).any(-1).mean() > 0.02
        inked = {who: (abs(image - to_rgb(ink)) < 0.1).all(-1).sum() for who, ink in COLOURS.items()}
        assert inked["trl"] > 20 and inked["liger"] > 20 and (inked["logratio"] > 20) == ("splits" in file)


def test_the_pages_images_are_of_its_measurements():
    """Run `logratio atlas` after a change of the variants or of the plots."""
    stored = json.loads((DOCS / "atlas.json").read_text())
    for file in atlas_plots.FILES:
        assert f"]({file})" in markdown(stored)
        assert Image.open(DOCS / file).info["Source"] == atlas_plots.stamp(stored)
