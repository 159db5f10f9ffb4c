"""The page: one HTML file for a run, or for several over each other, with nothing outside it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from logratio.benchmarks.reporting.palette import GRID, SERIES
from logratio.trainers.errors import UserError, counted

from ..reporting.files import write
from .card import write_card
from .charts import Chart, learning, rest
from .charts import cost as cost_charts
from .cost import cost
from .options import options, versions
from .rollouts import rollouts
from .runs import Run, read_runs, section, sets_of
from .svg import Drawing, colour_of, drawn, points_for
from .words import duration, number, plain, shortened

HERE = Path(__file__).parent
NAME = "report.html"
MAKER = "logratio report"
SUMMED_UP = (
    ("loss", "loss"),
    ("eval_loss", "evaluation loss"),
    ("rewards/accuracies", "pairs in order"),
    ("eval_rewards/accuracies", "pairs in order, evaluation"),
    ("rewards/margins", "margin"),
    ("reward", "reward"),
    ("eval_reward", "reward, evaluation"),
    ("kl", "KL"),
    ("completions/mean_length", "completion tokens"),
    ("mean_token_accuracy", "token accuracy"),
)
COUNTS = {
    "rows": "rows",
    "examples": "examples",
    "truncated": "completions truncated",
    "tokens_cut": "tokens cut off",
    "dropped": "dropped, nothing scored within max_length",
    "skipped": "rows skipped",
    "identical": "pairs of identical completions",
    "moved": "prompts that end in other tokens once the completion follows",
    "weighted": "examples with weights other than 1",
    "begun": "prompts that end with an assistant's turn",
    "special": "examples whose text has special tokens",
}


def report(folders: Sequence[Path], output: Path | None = None) -> list[str]:
    """Write the page of these runs, and of one the model card; returns what to tell.

    output: the file; None: `NAME` in the folder of one run, and here of several. Raises UserError where a folder is no
    run, or the file is not ours to write.
    """
    runs = read_runs(folders)
    path = output or (runs[0].folder / NAME if len(runs) == 1 else Path(NAME))
    check_target(path)
    text = rendered(runs)
    data = text.encode("utf-8", "replace")  # halves of a character, which JSON can hold
    write(path, data)
    steps = sum(run.num_steps for run in runs)
    size = len(data) / 1e6
    told = [f"{path}: {counted(len(runs), 'run')}, {counted(steps, 'step')}, {size:.2f} MB"]
    return told + ([write_card(runs[0])] if len(runs) == 1 else [])


def mark(maker: str = MAKER) -> Markup:
    """By which a page is known as ours, which may be replaced."""
    return Markup('<meta name="generator" content="{}">').format(maker)


def check_target(path: Path, maker: str = MAKER, option: str = "--output") -> None:
    """Raise UserError where the page cannot be written there, or something else is there. option: that says where."""
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; give a file, such as {path / NAME}")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}; make it, or give another file")
    if path.exists() and mark(maker) not in path.read_text(errors="replace")[:2000]:
        raise UserError(f"{path} was not made by `{maker}`, and is not overwritten: choose another {option}")


@contextlib.contextmanager
def made(folder: Path, option: str = "--output") -> Iterator[None]:
    """Inside, the folder is there; one that was made for this and is still empty at the end is removed."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{option} {folder} is no folder that can be written to ({error.strerror})") from error
    try:
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()


def template(path: Path) -> Template:
    """It escapes what it is given, and takes nothing that it is not."""
    where, kind = FileSystemLoader(path.parent), StrictUndefined
    found = Environment(loader=where, autoescape=True, undefined=kind, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {"plain": plain, "number": number, "shortened": shortened}
    return found.get_template(path.name)


def rendered(runs: Sequence[Run]) -> str:
    """The HTML. Whatever comes from a run is escaped by the template."""
    shown, of_cost = learning(runs), cost_charts(runs)
    others = rest(runs, [*shown, *of_cost])
    found = [(run, rollouts(run)) for run in runs]  # before the notes are read
    charts = shown + of_cost + others
    points = points_for(sum(len(chart.all & run.columns.keys()) + 1 for chart in charts for run in runs))

    def figures(charts: Sequence[Chart]) -> list[Drawing]:
        return [drawn(chart, runs, points) for chart in charts]

    table, costs = options(runs), [cost(run) for run in runs]
    return template(HERE / "page.html.j2").render(
        title=" · ".join([runs[0].name, runs[0].method]) if len(runs) == 1 else f"{len(runs)} runs",
        mark=mark(),
        css=css(),
        js=Markup((HERE / "page.js").read_text()),
        runs=runs,
        said=[run for run in runs if run.said],
        colours=[colour_of(at) for at in range(len(runs))],
        summary=summary(runs),
        learning=figures(shown),
        cost=figures(of_cost),
        rest=figures(others),
        costs=costs,
        unplanned=alike(runs, [one.why_not for one in costs]),
        cost_names=list(dict.fromkeys(name for one in costs for name in one.lines)),
        rollouts=[(run, one) for run, one in found if one is not None],
        notes=alike([run for run in runs for _ in run.notes], [note for run in runs for note in run.notes]),
        cards=alike(runs, [card_of(run) for run in runs]),
        told=[option for option in table if option.told],
        default=[option for option in table if not option.told],
        versions=versions(runs),
    )


def css() -> Markup:
    """The style of all pages."""
    return Markup((HERE / "page.css").read_text().replace("/* colours */", colours()))


def colours() -> str:
    """The palette as variables, for light and dark."""

    def block(dark: bool) -> str:
        ink = [f"--s{i}:{hue.dark if dark else hue.light}" for i, hue in enumerate(SERIES)]
        return ";".join([*ink, f"--grid:{GRID.dark if dark else GRID.light}"])

    classes = "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(len(SERIES)))
    return f":root{{{block(False)}}}@media (prefers-color-scheme:dark){{:root{{{block(True)}}}}}{classes}"


def summary(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(what, its value in each run): the last values of what tells most, and what the run took."""
    lines: list[tuple[str, list[str]]] = [("steps", [f"{run.last_step:,}" for run in runs])]
    for metric, name in SUMMED_UP:
        values = [run.last(metric) for run in runs]
        if any(value is not None for value in values):
            lines.append((name, [number(value) for value in values]))
    in_steps = lambda column: duration(float(np.nansum(column.values)) / 1e3)  # noqa: E731
    at_most = lambda column: f"{number(float(np.nanmax(column.values)))} MiB"  # noqa: E731
    for metric, name, told in (("step_ms", "time in steps", in_steps), ("peak_mem_mib", "peak memory", at_most)):
        columns = [run.known(metric) for run in runs]
        if any(columns):
            lines.append((name, ["–" if column is None else told(column) for column in columns]))
    return lines


def card_of(run: Run) -> list[dict[str, Any]]:
    """What became of the rows, for each data set: its name, its use, and (how many, what) for each count but 0."""
    found = []
    for split, use in (("train", "to train on"), ("evaluation", "to evaluate on")):
        part = section(run.card, split)
        sets = sets_of(part)
        if isinstance(part.get("examples"), int) and not sets:
            sets = [{"name": "held out of the rows above", "examples": part["examples"]}]
        for one in sets:
            counts = [(one[key], words) for key, words in COUNTS.items() if one.get(key)]
            if one.get("labels"):
                counts.append((one["labels"][0], f"of them desirable, {one['labels'][1]:,} undesirable"))
            mean = {"prompt": part.get("prompt_tokens"), "completion": part.get("completion_tokens")}
            lengths = [f"{number(value, 3)} tokens a {name}" for name, value in mean.items() if value is not None]
            found.append(
                {
                    "name": str(one.get("name", "")),
                    "use": use,
                    "streamed": bool(part.get("streamed")),
                    "counts": counts,
                    "reasons": str(one.get("skipped_reasons") or ""),
                    "lengths": ", ".join(lengths) if one is sets[0] else "",
                    "bar": parts_of(one),
                }
            )
    return found


def alike(runs: Sequence[Run], told: Sequence[Any]) -> list[tuple[list[Run], Any]]:
    """Each thing that is told once, with all the runs that it is told of."""
    found: list[tuple[list[Run], Any]] = []
    for run, one in zip(runs, told, strict=True):
        same = next((of for of, other in found if other == one), None)
        if same is None:
            found.append(([run], one))
        else:
            same.append(run)
    return found


def parts_of(one: dict[str, Any]) -> list[tuple[str, float, int]]:
    """(what, share, colour) of the examples that are whole, cut, dropped, and of the rows skipped."""
    cut, dropped, skipped = (int(one.get(name) or 0) for name in ("truncated", "dropped", "skipped"))
    whole = max(int(one.get("examples") or 0) - cut, 0)
    parts = [("whole", whole, 2), ("with a completion cut", cut, 4), ("dropped", dropped, 1), ("skipped", skipped, 3)]
    total = sum(count for _, count, _ in parts)
    return [(name, count / total, colour) for name, count, colour in parts if count] if total else []
