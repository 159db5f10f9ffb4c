"""Completions on the screen: of one prompt the best and the worst, a line each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from rich.text import Text


def best_and_worst(rows: Sequence[dict[str, Any]], width: int) -> list[str]:
    """Lines of at most `width` columns. rows: of `completions.parquet`, of one step, whose prompts take turns."""
    step = rows[0]["step"]
    prompts = list(dict.fromkeys(row["row"] for row in rows))
    group = [row for row in rows if row["row"] == prompts[step % len(prompts)]]
    group.sort(key=lambda row: (row["reward"] is None, -(row["reward"] or 0.0)))  # in turn where they are equal
    said = [one_line(as_turns(row["completion"])) for row in (group[0], group[-1])]
    lines = [fitted(f"step {step}, row {group[0]['row']}: ", one_line(as_turns(group[0]["prompt"])), width, end=True)]
    for row, text in zip((group[0], group[-1]), said, strict=True):
        cut = " (cut)" if row["finish_reason"] == "length" else ""
        lines.append(fitted(f"  {rewards_of(row)}{cut}: ", text, width))
    return lines


def as_turns(value: Any) -> str:
    """Text as it is; a list of messages, or one written out as JSON as completions.parquet has it, turn by turn."""
    turns = value
    if isinstance(value, str) and value.startswith("[{"):
        with contextlib.suppress(ValueError):
            turns = json.loads(value)
    if isinstance(turns, list) and all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in turns):
        said = ("" if one["content"] is None else _text(one["content"]) for one in turns)
        return "\n".join(f"{one['role']}: {content}" for one, content in zip(turns, said, strict=True))
    return _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def rewards_of(row: dict[str, Any]) -> str:
    """The reward and, where there are several, what it is made of."""
    parts = {name.removeprefix("rewards/"): value for name, value in row.items() if name.startswith("rewards/")}
    made = ", ".join(f"{name} {number(value)}" for name, value in parts.items())
    return f"reward {number(row['reward'])}" + (f" ({made})" if len(parts) > 1 else "")


def number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def one_line(text: str) -> str:
    """With what is no character to be printed as Python writes it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def fitted(begin: str, text: str, width: int, *, end: bool = False) -> str:
    """Both on one line of at most `width` columns; what does not fit of the text is cut off, or with `end` all before
    its end."""
    room = max(8, width - Text(begin).cell_len)
    if Text(text).cell_len > room:
        cut = Text(text[::-1] if end else text)
        cut.truncate(room - 3)
        text = f"...{cut.plain[::-1]}" if end else f"{cut.plain}..."
    line = Text(begin + text)
    line.truncate(width)
    return line.plain
