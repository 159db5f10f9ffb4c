"""`logratio gallery`: docs/losses/, a page for each method with pictures of all its variants."""

from __future__ import annotations

from pathlib import Path

import tyro

from logratio.losses import LOSSES
from logratio.trainers.errors import UserError

from ..pages.page import made
from ..reporting import drawing
from .curves import drawn
from .families import groups
from .page import page, x_label


def main(argv: list[str] | None = None) -> int:
    """Write pages and pictures."""

    def options(method: str | None = None, out: Path = Path("docs/losses")) -> tuple[str | None, Path]:
        """Draw every registered loss: its value, its weight and its step, with formula, paper, options and laws.

        Args:
            method: only this one of sft, dpo, kto, listwise, orpo, cpo, tpo, grpo.
            out: folder of the pages and pictures.
        """
        return method, out

    method, out = tyro.cli(options, args=argv, prog="logratio gallery")
    if method is not None and method not in LOSSES:
        raise UserError(f"unknown method {method!r}, expected one of: {', '.join(LOSSES)}")
    with drawing():
        from .draw import draw
    with made(out, "--out"):
        for name in LOSSES if method is None else [method]:
            for picture, _, members in groups(name):
                draw({one.name: drawn(one.loss, one.state) for one in members}, x_label(name), out / f"{picture}.png")
            (out / f"{name}.md").write_text(page(name))
    return 0
