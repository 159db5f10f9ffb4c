"""The pages of docs/ that are written for readers, and the code blocks in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.glob("*/*.md")) + ["index.md"]
"""The others are older, and held by tests of their own."""


class Block(NamedTuple):
    """language: "" where there is none. title: of the file that it is."""

    language: str
    title: str
    text: str


def text_of(page: str) -> str:
    return (DOCS / page).read_text()


def blocks(page: str) -> list[Block]:
    found = re.findall(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', text_of(page), re.DOTALL | re.MULTILINE)
    return [Block(*parts) for parts in found]


def messages(page: str) -> list[str]:
    """Lines quoted as the program says them, with … for what differs."""
    return re.findall(r"^> (.+)$", text_of(page), re.MULTILINE)
