"""Benchmark records in the order of tables and legends, what ratios are to, and where numbers come from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from logratio.trainers.errors import counted

Row = dict[str, Any]

OURS = "logratio"
CONTESTANTS = (
    OURS,
    "logratio (triton)",
    "logratio (two_gemm)",
    "trl",
    "trl+liger",
    "liger",
    "liger (cross entropy)",
    "liger (grpo)",
    "liger (jsd)",
    "torch",
    "eager",
)
SAID = {"oom": "out of memory", "refused": "refused", "failed": "failed"}
ORDERS: dict[str, Sequence[str]] = {
    "contestant": CONTESTANTS,
    "method": ("sft", "dpo", "kto", "listwise", "orpo", "cpo", "tpo", "grpo"),
    "adapter": ("full", "lora", "qlora"),
    "head": ("frozen", "trainable"),
}
"""The order of names in tables and legends; any other name comes behind these, by alphabet."""


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by their values of `keys`, in the order that tables have."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return dict(sorted(found.items(), key=lambda item: [_rank(*pair) for pair in zip(keys, item[0], strict=True)]))


def _rank(key: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, int | float):
        return 0, value, ""
    order = ORDERS.get(key, ())
    return 1, order.index(value) if value in order else len(order), str(value)


def contestants(rows: Iterable[Row]) -> list[str]:
    """Their names, ours first."""
    return [name for (name,) in groups(rows, "contestant")]


def named(values: Iterable[Any]) -> str:
    """What a table or plot is of."""
    return ", ".join(str(value).replace("_", " ") for value in values if value is not None)


def bases(rows: Sequence[Row]) -> dict[str, Row]:
    """Case -> the measured row that ratios are to: of one contestant for all rows, the first of ours that has any."""
    measured = [row for row in rows if row["status"] == "ok"]
    ours = [name for name in contestants(measured) if name.startswith(OURS)]
    return {row["case"]: row for row in measured if row["contestant"] in ours[:1]}


def quotient(row: Row, base: Row | None, key: str) -> float | None:
    """row[key] over the base's; None where one of them was not measured.

    Of times and rates of steps that took turns it is the median of the rounds' ratios, in which a slow moment of the
    machine counts on both sides.
    """
    if base is None or not row.get(key) or not base.get(key):
        return None
    paired = row.get("time_to_ours")
    if paired and base["contestant"] == OURS and row["certificate"] == base["certificate"]:
        if key in ("step_ms_p50", "examples_per_s"):
            return float(paired) if key == "step_ms_p50" else 1 / float(paired)
    return float(row[key]) / float(base[key])


def sources(rows: Sequence[Row]) -> str:
    """Where the numbers come from: a line for each device, commit, command and set of versions, with its records."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        same = {
            key: row["certificate"].get(key)
            for key in ("commit", "command", "driver", "cuda", "threads", "python", "versions")
        }
        found.setdefault(json.dumps(same, sort_keys=True), []).append(row)
    out = "".join(f"- {_source(group)}\n" for _, group in sorted(found.items()))
    older = sum(row.get("older", 0) for row in rows)
    if older:
        out += f"- {counted(older, 'older line')} of the same measurements: not shown.\n"
    return "Source:\n\n" + out


def _source(rows: Sequence[Row]) -> str:
    record = rows[0]["certificate"]
    versions = [f"{name} {version}" for name, version in (record.get("versions") or {}).items()]
    machine = [rows[0]["device"]]
    machine += [f"{name} {record[key]}" for key, name in (("driver", "driver"), ("cuda", "CUDA")) if record.get(key)]
    common = [
        said(key, value)
        for key, value in (record.get("settings") or {}).items()
        if all((row["certificate"].get("settings") or {}).get(key) == value for row in rows)
    ]
    if rows[0]["gpu"] == "cpu" and record.get("threads"):
        machine.append(f"{counted(record['threads'], 'thread')}")
    python = [f"Python {record['python']}"] if record.get("python") else []
    parts = [lines_of(rows), ", ".join(machine), f"commit {record.get('commit')}", f"`{record.get('command')}`"]
    return "; ".join(filter(None, [*parts, ", ".join([*python, *versions]), ", ".join(common)])) + "."


def said(key: str, value: Any) -> str:
    """A setting, or a group of them."""
    name = key.replace("_", " ")
    if isinstance(value, dict):
        return f"{name} ({', '.join(said(*item) for item in value.items())})"
    return f"{name} {value}"


def lines_of(rows: Iterable[Row]) -> str:
    """step.jsonl:3, 5-9, of the rows' `source`."""
    files: dict[str, list[int]] = {}
    for row in rows:
        file, line = row["source"].rsplit(":", 1)
        files.setdefault(file, []).append(int(line))
    out = []
    for file, numbers in sorted(files.items()):
        runs = [[*run] for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
        ends = [(run[0][1], run[-1][1]) for run in runs]  # of lines that follow one another
        out.append(f"{file}:" + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ends))
    return "; ".join(out)
