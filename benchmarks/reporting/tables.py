"""The tables of benchmarks/README.md out of benchmark records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .rows import SAID, Row, bases, contestants, groups, quotient

LONGEST = 200
"""Characters of an error that a table shows."""


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table, without the columns that are empty in every line."""
    lines = [list(line) for line in lines]
    kept = [i for i in range(len(head)) if any(line[i] for line in lines)]
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(_escaped(line[i]) for i in kept) + " |" for line in cells) + "\n"


def on_screen(title: str, heads: Sequence[str], lines: Iterable[Sequence[str]], padding: Any = (0, 1)) -> Table:
    """A table for a terminal: numbers to the right, words in its first column, and in those without a name, to the
    left."""
    shown = Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=padding)
    for at, head in enumerate(heads):
        shown.add_column(head, justify="left" if at == 0 or not head else "right", overflow="fold")
    for line in lines:
        shown.add_row(*map(escape, line))
    return shown


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def number(value: float | None, digits: int = 3) -> str:
    """To so many significant digits, never as a power of ten; thousands with commas."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def small(value: float | None) -> str:
    """An error."""
    return "" if value is None else f"{value:.1e}"


def spread(row: Row, stem: str) -> str:
    """p50 (p20-p80)."""
    low, middle, high = (number(row.get(f"{stem}_{p}")) for p in ("p20", "p50", "p80"))
    return f"{middle} ({low}-{high})" if low and high else middle


def joined(*parts: str) -> str:
    """Those that say something."""
    return ", ".join(filter(None, parts))


def beside_ours(key: str, shown: Callable[[Row], str] | None) -> Callable[[Row, Row | None], str]:
    """What a cell says of a field: the number, unless `shown` is None, and how many times ours it is."""
    return lambda row, base: joined(shown(row) if shown else "", times(quotient(row, base, key)))


def reason(row: Row) -> str:
    """Why there is no number: the status, and the first line of its error."""
    first = (str(row.get("error") or "").strip().splitlines() or [""])[0]
    first = first if len(first) <= LONGEST else first[: LONGEST - 3] + "..."
    return SAID[row["status"]] + (f": {first}" if first else "")


def matrix(rows: Sequence[Row], keys: dict[str, str], cell: Callable[[Row, Row | None], str], *, base: str = "") -> str:
    """A line for each case, a column for each contestant. keys: head of a column -> the record's field that it shows.

    base: what the head of the column that ratios are to says. Empty where no cell has anything to say.
    """
    cases = groups(rows, *keys.values(), "case")
    if len({key[:-1] for key in cases}) < len(cases):  # the fields do not tell these cases apart
        keys = {**keys, "case": "case"}
    ours, names = bases(rows), contestants(rows)
    base_names = {row["contestant"] for row in ours.values()} if base else set()
    lines, filled = [], False
    for *_, case in cases:
        of = {row["contestant"]: row for row in rows if row["case"] == case}
        shown = {
            name: cell(row, ours.get(case)) if row["status"] == "ok" else SAID[row["status"]]
            for name, row in of.items()
        }
        filled |= any(shown[name] for name, row in of.items() if row["status"] == "ok")
        first = next(iter(of.values()))
        labels = [_label(first.get(key)) for key in keys.values()]
        lines.append([*labels, *(shown.get(name, "not run") or "-" for name in names)])
    head = [*keys, *(f"{name} {base}" if name in base_names else name for name in names)]
    return table(head, lines) if filled else ""


def _label(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def reasons(rows: Sequence[Row]) -> str:
    """A line for each contestant and reason of what a matrix could only name by one word."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            found.setdefault(f"{row['contestant']}, {_escaped(reason(row))}", []).append(f"`{row['case']}`")
    return "".join(f"- {text} ({', '.join(cases)})\n" for text, cases in found.items())


def head_tables(rows: Sequence[Row], absolute: bool) -> list[str]:
    """Time, share of the ceiling, memory and errors of the LM head, each a line for every shape."""
    keys = {"H": "hidden_size", "V": "vocab_size", "tokens": "num_tokens", "dtype": "dtype", "head": "head"}

    def rate(row: Row, base: Row | None) -> str:
        share = row.get("share_of_gemm")
        rate = number(row.get("tflops")) if absolute else ""
        return joined(rate, "" if share is None else f"{100 * share:.0f} %")

    def errors(row: Row, base: Row | None) -> str:
        found = [small(row.get(key)) or "-" for key in ("logps_err", "grad_hidden_err", "grad_weight_err")]
        return " / ".join(found) if set(found) != {"-"} else ""

    unit = "ms, p50 (p20-p80), and" if absolute else "as"
    time = beside_ours("time_ms_p50", (lambda row: spread(row, "time_ms")) if absolute else None)
    return titled(
        rows,
        {
            f"Time, {unit} multiple of ours": matrix(rows, keys, time, base="(1×)"),
            f"{'TFLOP/s, and share' if absolute else 'Share'} of the measured matrix product's": matrix(
                rows, keys, rate
            ),
            "Peak memory in MiB, and as multiple of ours": matrix(rows, keys, _memory, base="(1×)"),
            "Relative error against float64: log-probabilities / gradient of hidden states / of the weight": matrix(
                rows, keys, errors
            ),
        },
    )


_memory = beside_ours("peak_mem_mib", lambda row: number(row.get("peak_mem_mib"), 1))


def titled(rows: Sequence[Row], tables: dict[str, str]) -> list[str]:
    out = [f"**{title}**\n\n{text}" for title, text in tables.items() if text]
    if not out:  # nothing was measured, which is said all the same
        return [text for text in [reasons(rows)] if text]
    return [*out, *([f"Not measured:\n\n{reasons(rows)}"] if reasons(rows) else [])]


STEP_COLUMNS = (
    "method,contestant,case,step ms p50 (p20-p80),tokens/s,examples/s,our speed / its,peak MiB,its memory / ours,"
    "predicted peak,autograd keeps MiB,its / ours,tokens (computed; padding),attention,gradient differs by,ledger,"
    "not measured"
).split(",")


def step_tables(rows: Sequence[Row], absolute: bool) -> list[str]:
    """One table of a model, adapter and workload: a line for each contestant of each method."""
    ours, lines = bases(rows), []
    by_method = groups(rows, "method", "case", "contestant")
    several = len({case for _, case, _ in by_method}) > len({method for method, _, _ in by_method})
    for (method, case, contestant), found in by_method.items():
        (row,) = found
        base = ours.get(case)
        names = [str(method), contestant, f"`{case}`" if several else ""]
        if row["status"] != "ok":
            lines.append([*names, *[""] * (len(STEP_COLUMNS) - 4), reason(row)])
            continue
        slower = quotient(row, base, "examples_per_s")
        speeds = [spread(row, "step_ms"), number(row.get("tokens_per_s")), number(row.get("examples_per_s"))]
        lines.append(
            [
                *names,
                *(speeds if absolute else [""] * 3),
                times(1 / slower if slower else None),
                number(row.get("peak_mem_mib"), 1),
                times(quotient(row, base, "peak_mem_mib")),
                predicted(row),
                number(row.get("saved_mib"), 1),
                times(quotient(row, base, "saved_mib")),
                _tokens(row),
                str(row.get("attention") or ""),
                small(row.get("grad_rel_err")),
                ledger(row.get("ledger") or {}),
                "",
            ]
        )
    return [table(STEP_COLUMNS, lines)]


def predicted(row: Row) -> str:
    """By how much the prediction is off what was measured."""
    ratio = quotient({"mib": row.get("predicted_peak_mem_mib")}, {"mib": row.get("peak_mem_mib")}, "mib")
    return "" if ratio is None else f"{number(row['predicted_peak_mem_mib'], 1)} ({100 * (ratio - 1):+.1f} %)"


def _tokens(row: Row) -> str:
    real, computed, padding = (row.get(key) for key in ("num_tokens", "num_padded_tokens", "padding"))
    told = number(computed, 1) + ("" if padding is None else f"; {100 * padding:.2g} %")
    return number(real, 1) + (f" ({told})" if computed is not None else "")


def ledger(entries: dict[str, float | None]) -> str:
    """What the contestant's arithmetic costs in accuracy, as far as it was measured."""
    out = []
    for key, value in entries.items():
        if value is not None:
            shown = (
                f"{100 * value:.3g} %" if key.startswith("share") else f"{value:.7g}" if "cos" in key else small(value)
            )
            out.append(f"{key.replace('_', ' ')} {shown}")
    return ", ".join(out)


def scale_tables(rows: Sequence[Row], absolute: bool) -> list[str]:
    """Time and memory along one axis, of a model, adapter, workload and method: a line for each value."""
    keys = {str(rows[0]["axis"]).replace("_", " "): "value"}
    time = beside_ours("step_ms_p50", (lambda row: spread(row, "step_ms")) if absolute else None)
    unit = "ms of a step, p50 (p20-p80), and" if absolute else "as"
    return titled(
        rows,
        {
            f"Time, {unit} multiple of ours": matrix(rows, keys, time, base="(1×)"),
            "Peak memory in MiB, and as multiple of ours": matrix(rows, keys, _memory, base="(1×)"),
            "Predicted peak memory in MiB (off what was measured)": matrix(
                rows, keys, lambda row, base: predicted(row)
            ),
        },
    )


def host_tables(rows: Sequence[Row], absolute: bool) -> list[str]:
    """What Python costs: a line for each method."""

    def of(key: str) -> str:
        return matrix(rows, {"method": "method"}, lambda row, base: number(row.get(key)))

    tables = {"A step": of("units"), "Forward and backward of the model that it trains": of("passes_units")}
    return titled(rows, {f"{name}, in passes of the plain model": text for name, text in tables.items()})


def rollout_tables(rows: Sequence[Row], absolute: bool) -> list[str]:
    """Sampling, and the steps that learn from it: a line for each shape of prompts, completions and limit."""
    keys = {"prompts": "prompts", "group": "completions each", "tokens": "up to tokens", "ends": "some end before"}
    step = beside_ours("step_ms_p50", (lambda row: number(row.get("step_ms_p50"))) if absolute else None)

    def a_token(row: Row, base: Row | None) -> str:
        """Of completions that end, which nobody has as many tokens of as another, their times would not do."""
        ratio = times(None if base is None else quotient(base, row, "rollout_tokens_per_s"))
        return joined(number(row.get("rollout_ms_p50")) if absolute else "", ratio)

    unit = "ms (p50), and " if absolute else ""
    return titled(
        rows,
        {
            f"Rollouts, {unit}a token's time as multiple of ours": matrix(rows, keys, a_token, base="(1×)"),
            f"Whole GRPO steps, {unit}as multiple of ours": matrix(rows, keys, step, base="(1×)"),
        },
    )


TAKEN_PER_S = 200
"""Examples that a step on a GPU takes in a second, estimated: what reading is measured by."""


def data_tables(rows: Sequence[Row], absolute: bool) -> list[str]:
    """How fast examples come out of their table, and what memory that takes: a line for each size."""

    def multiple(row: Row, key: str) -> str:
        return times(None if row.get(key) is None else row[key] / TAKEN_PER_S)

    head = (
        *("rows", "tokens each", f"read and packed, of {TAKEN_PER_S} a second", "read alone"),
        *("peak memory, MiB", "of it beyond the imports"),
    )
    lines = [
        (
            *(f"{row['rows']:,}", f"{row['row_tokens']:,}"),
            *(multiple(row, f"{name}_examples_per_s") for name in ("packed", "read")),
            *(number(row.get(f"{name}_mib"), 0) for name in ("peak_rss", "beyond_imports")),
        )
        for row in sorted(rows, key=lambda row: row["rows"])
    ]
    return titled(rows, {"Examples out of their table, in a training process without a model": table(head, lines)})
