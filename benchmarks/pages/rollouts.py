"""What GRPO sampled, out of a run's completions.parquet: rewards by stretch of training, the best and the worst, and
the first and the last completions of the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from logratio.trainers.logs.samples import as_turns

from .runs import Run
from .words import number, shortened, tick

FILE = "completions.parquet"
STRETCHES, BINS, FUNCTIONS = 4, 24, 6
SAMPLED = ("sampler_logp", "logp_diff")
"""Means over a completion, in nats: of its log-probs as it was sampled, and of how far the trainer's are from them."""
SHOWN = 3
"""Of the best and of the worst, and of pairs of early and late ones."""
LOOKED_AT = 5000
"""Of the first and of the last completions, for prompts that come in both."""


@dataclass(frozen=True)
class Sample:
    """A completion as the page shows it. figures: what is known of it, in words."""

    step: int
    prompt: str
    text: str
    figures: str


@dataclass
class Rollouts:
    """histograms: (reward's name, its SVG). pairs: (early, late) completions; same: of the same prompts.
    equal: in the place of the best and the worst, where all rewards are equal."""

    count: int
    histograms: list[tuple[str, Markup]] = field(default_factory=list)
    best: list[Sample] = field(default_factory=list)
    worst: list[Sample] = field(default_factory=list)
    equal: list[Sample] = field(default_factory=list)
    pairs: list[tuple[Sample, Sample]] = field(default_factory=list)
    same: bool = True
    last: tuple[int, int] = (0, 0)  # steps of the last stretch


def rollouts(run: Run) -> Rollouts | None:
    """None where the run kept no completions, or none that can be read, which its notes then say."""
    path = run.folder / FILE
    if not path.exists():
        return None
    try:
        table = pq.read_table(path).combine_chunks()
    except (OSError, pa.ArrowException) as error:
        run.notes.append(f"{FILE} cannot be read ({str(error).splitlines()[0]}): it may still be being written")
        return None
    names = set(table.column_names)
    if not {"step", "completion"} <= names or not table.num_rows:
        run.notes.append(f"{FILE} has no rows" if not table.num_rows else f"{FILE} lacks 'step' or 'completion'")
        return None
    if not pa.types.is_integer(table["step"].type) or table["step"].null_count:
        run.notes.append(f"{FILE}: 'step' must be whole numbers")
        return None
    steps = np.asarray(table["step"].to_pylist(), dtype=np.int64)
    first, last = int(steps.min()), int(steps.max())
    edges = np.linspace(first, last + 1, min(STRETCHES, last - first + 1) + 1).round().astype(int)
    found = Rollouts(table.num_rows, last=(int(edges[-2]), last))
    functions = sorted(name for name in names if name.startswith("rewards/"))[:FUNCTIONS]
    shown = [*(["reward"] if "reward" in names else []), *(functions if len(functions) > 1 else [])]
    for name in [*shown, *(name for name in SAMPLED if name in names)]:
        values = floats(table, name)
        if np.isfinite(values).any():
            found.histograms.append((name, histogram(steps, values, edges)))
    if "reward" in names:
        rewards = floats(table, "reward")
        late = np.flatnonzero((steps >= edges[-2]) & np.isfinite(rewards))
        order = late[np.argsort(rewards[late], kind="stable")]
        ends = [samples(table, different(table, rows)) for rows in (order.tolist(), order[::-1].tolist())]
        if len(order) and rewards[order[0]] == rewards[order[-1]]:
            found.equal = ends[0]
        else:
            found.worst, found.best = ends
    if len(edges) > 2:
        found.pairs, found.same = pairs(table, steps, int(edges[1]), int(edges[-2]))
    return found


def floats(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers, NaN where there is none."""
    values = table[name].to_pylist()
    return np.array([value if isinstance(value, int | float) else math.nan for value in values], dtype=np.float64)


def different(table: pa.Table, rows: Sequence[int]) -> list[int]:
    """The first `SHOWN` of the rows, of different prompts and texts as far as there are such."""
    chosen: list[int] = []
    seen: set[str] = set()
    for row in rows:
        key = prompt_of(table, row) or text_of(table["completion"][row].as_py())
        if key not in seen:
            seen.add(key)
            chosen.append(row)
        if len(chosen) == SHOWN:
            break
    return chosen


def pairs(table: pa.Table, steps: np.ndarray, early: int, late: int) -> tuple[list[tuple[Sample, Sample]], bool]:
    """Completions from before step `early` beside ones from step `late` on; True where their prompts are the same."""
    before = np.flatnonzero(steps < early)[:LOOKED_AT].tolist()
    after = np.flatnonzero(steps >= late)[-LOOKED_AT:].tolist()
    first: dict[str, int] = {}
    for row in before:
        first.setdefault(prompt_of(table, row), row)
    found: dict[str, tuple[int, int]] = {}
    if "prompt" in table.column_names:
        for row in reversed(after):
            prompt = prompt_of(table, row)
            if prompt in first and prompt not in found:
                found[prompt] = (first[prompt], row)
            if len(found) == SHOWN:
                break
    chosen = list(found.values()) or list(zip(different(table, before), different(table, after[::-1]), strict=False))
    return [(samples(table, [one])[0], samples(table, [other])[0]) for one, other in chosen], bool(found)


def prompt_of(table: pa.Table, row: int) -> str:
    return text_of(table["prompt"][row].as_py()) if "prompt" in table.column_names else ""


def text_of(value: Any) -> str:
    """Of text, or of a list of messages."""
    return "" if value is None else as_turns(value)


def samples(table: pa.Table, rows: Sequence[int]) -> list[Sample]:
    """Rows as the page shows them."""
    found = []
    for row in rows:
        one = {name: table[name][row].as_py() for name in table.column_names}
        parts = [(name.removeprefix("rewards/"), value) for name, value in one.items() if name.startswith("rewards/")]
        parts = parts if len(parts) > 1 else []
        figures = numbers([("reward", one.get("reward")), *parts, ("advantage", one.get("advantage"))])
        if one.get("completion_length") is not None:
            figures.append(f"{one['completion_length']} tokens")
        if one.get("finish_reason"):
            figures.append(str(one["finish_reason"]))
        figures += numbers([(name, one.get(name)) for name in SAMPLED])
        if one.get("engine") and one.get("policy_version") is not None:
            figures.append(f"by {one['engine']} with the policy after step {one['policy_version']}")
        prompt, text = text_of(one.get("prompt")), text_of(one["completion"])
        found.append(Sample(int(one["step"]), shortened(prompt), shortened(text), " · ".join(figures)))
    return found


def numbers(named: Sequence[tuple[str, Any]]) -> list[str]:
    return [f"{name} {number(value, 3)}" for name, value in named if isinstance(value, int | float)]


def histogram(steps: np.ndarray, values: np.ndarray, edges: np.ndarray) -> Markup:
    """Shares of the values, a row of bars for each stretch of steps, over one axis."""
    finite = values[np.isfinite(values)]
    different_values = np.unique(finite)
    if len(different_values) <= BINS // 2:  # a bar for each value
        gap = float(np.diff(different_values).min()) if len(different_values) > 1 else 1.0
        low, high = float(different_values[0]) - gap / 2, float(different_values[-1]) + gap / 2
        bins = min(math.ceil((high - low) / gap - 1e-9), 4 * BINS)
    else:
        low, high, bins = float(finite.min()), float(finite.max()), BINS
    width, left, top, row = 420, 92, 6, 48
    height = top + row * (len(edges) - 1) + 24
    out = [f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{len(edges) - 1} histograms">']
    scale = (width - left - 10) / bins
    heres = [
        values[(steps >= start) & (steps < end) & np.isfinite(values)]
        for start, end in zip(edges[:-1], edges[1:], strict=True)
    ]
    shares = [np.histogram(here, bins=bins, range=(low, high))[0] / max(len(here), 1) for here in heres]
    highest = max(float(share.max()) for share in shares)
    for at, (start, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        here = heres[at]
        base = top + row * (at + 1) - 4
        told = f"{start:,}" if end - start == 1 else f"{start:,}–{end - 1:,}"
        mean = f"mean {number(float(here.mean()), 3)}" if len(here) else "none"
        out.append(f'<text x="{left - 8}" y="{base - 20}" text-anchor="end">{told}</text>')
        out.append(f'<text x="{left - 8}" y="{base - 5}" text-anchor="end" class="soft">{mean}</text>')
        out.append(f'<path class="grid" d="M{left} {base}H{width - 10}"/>')
        for bin_, share in enumerate(shares[at].tolist()):
            if share:
                tall = max((row - 12) * share / highest, 1)
                x = left + bin_ * scale
                between = f"{number(low + (high - low) * (bin_ + 0.5) / bins, 3)}: {100 * share:.1f} %"
                out.append(
                    f'<rect class="column s0" x="{x + 0.06 * scale:.1f}" y="{base - tall:.1f}" '
                    f'width="{0.88 * scale:.1f}" height="{tall:.1f}"><title>{between}</title></rect>'
                )
    for value in sorted({float(finite.min()), float(finite.max())}):
        x = left + (value - low) / (high - low) * (width - left - 10)
        out.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{tick(value)}</text>')
    return Markup("".join(out) + "</svg>")
