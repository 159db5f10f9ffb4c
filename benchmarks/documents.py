"""The generated parts of docs/: `python -m logratio.benchmarks.documents` writes them, from the root of a checkout.

Each lies between two comments in a page that is else written by hand. Memory and time are `logratio plan`'s; options
are the dataclasses' own fields, defaults and docstrings, and TRL's those of the installed one.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from logratio.losses import LOSSES, SAMPLING_CORRECTIONS
from logratio.losses.options import readers_said
from logratio.trainers.config import DataConfig, ModelConfig, RolloutConfig, SaveConfig, TrainConfig
from logratio.trainers.options import parse_train

from . import trl_options
from .peers.text import table
from .plan import PlanConfig, of_run
from .planned import Options, planned
from .reporting.records import read

RECIPES = ("sft", "dpo", "kto", "orpo", "grpo")
WAYS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_r": 16}, "qlora": {"lora_r": 16, "load_in_4bit": True}}
TITLES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
ORDER = ("sft", "dpo", "kto", "listwise", "orpo", "cpo", "tpo", "grpo")


def recipe(folder: Path, method: str, way: str, gpu: str = "RTX4090") -> dict[str, Any]:
    """What `logratio plan` says of a recipe where every example is as long as it allows: 512 + 512 tokens."""
    run = parse_train([method, "--config", str(folder / method / f"{way}.yaml")])
    half = run.data.max_length // 2
    return of_run(run, PlanConfig(gpu=gpu, prompt_tokens=half, completion_tokens=half))


def recipes() -> str:
    """A row for each recipe."""
    found = {(method, way): recipe(Path("configs/recipes"), method, way) for method in RECIPES for way in WAYS}
    return table(
        ("recipe", "memory, MiB", "step on an RTX4090, ms"),
        (
            (f"`{method}/{way}.yaml`", mib(told["needed_mib"]), f"{told['predicted_step_ms']:,.0f}")
            for (method, way), told in found.items()
        ),
    )


def models(model: str) -> str:
    """What a step takes by method and by what is trained, and of it the reference."""
    rows = []
    for method in ORDER:
        told = {way: planned(Options(model_name_or_path=model, method=method, **how)) for way, how in WAYS.items()}
        copies = 2 if LOSSES[method]().wants_reference else 1
        cells = [mib(one["needed_mib"]) for one in told.values()]
        references = [mib(told[way]["parts_mib"]["reference"]) for way in ("full", "lora")]
        rows.append((f"`{method}`", str(copies), *cells, *references))
    heads = [TITLES[way] for way in WAYS]
    return table(("method", "models", *heads, "of full: the reference", "of LoRA: the reference"), rows)


def measured() -> str:
    """The last lines of each method's steps on an H200, ours and TRL's."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for row in read(Path("benchmarks/results/nvidia-h200.jsonl")):
        if row["suite"] == "step" and row["model"] == "Qwen2.5-0.5B" and row["status"] == "ok":
            last[row["method"], row["contestant"]] = row
    rows = []
    for method in RECIPES:
        ours, theirs = last[method, "logratio"], last[method, "trl"]
        cells = []
        for name in ("step_ms_p50", "peak_mem_mib"):
            cells += [f"{ours[name]:,.0f}", f"{ours[name] / theirs[name]:.2f}"]
        rows.append((f"`{method}`", *cells))
    return table(("method", "step here, ms", "of TRL's time", "peak here, MiB", "of TRL's peak"), rows)


def variants(loss: Any, weights: bool = False) -> str:
    """loss_type -> its formula, from the docstring. weights: it has a normaliser beside."""
    rows = []
    for name, entry in loss.option_tables["loss_type"].items():
        cells = [formula(entry)] + ([first_sentence(entry.weight)] if weights else [])
        rows.append((f"`{name}`", *cells))
    return table(("`loss_type`", "formula", *(["normaliser"] if weights else [])), rows)


def formula(entry: Any) -> str:
    made = maker(entry)
    shift = f"; shift: {first_sentence(entry.shift)}" if hasattr(entry, "shift") else ""
    return first_sentence(made) + shift


def maker(entry: Any) -> Any:
    """The function of a variant's formula."""
    return next((getattr(entry, name) for name in ("formula", "surrogate", "value") if hasattr(entry, name)), entry)


def first_sentence(made: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    text = " ".join((inspect.getdoc(made) or "").split("\n\n")[0].split())
    return text.rstrip(".")


def differences(loss: type[Any]) -> str:
    """What the module of a loss says of TRL and the papers, a line for each."""
    text = inspect.getdoc(sys.modules[loss.__module__]) or ""
    lines: list[str] = []
    for part in re.split(r"(?m)(?=^Differs from |^As in )", text)[1:]:
        whose, _, rest = part.partition(":") if part.startswith("Differs") else ("", "", "")
        each = [one for one in re.split(r"\(\d+\)\s", rest) if one.strip()]
        lines += ["", f"{' '.join(whose.split())}:" if whose else " ".join(part.split()), ""]
        lines += [f"- {' '.join(one.split()).rstrip(';.')}." for one in each]
    return "\n".join(lines).strip()


def mib(value: float) -> str:
    return f"{value:,.0f}"


def documented(part: type[Any]) -> dict[str, str]:
    """field -> the docstring behind it."""
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
    assert isinstance(made, ast.ClassDef)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in zip(made.body, made.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def options_of(part: type[Any]) -> str:
    """A row for each field of a dataclass."""
    docs, rows = documented(part), []
    for f in dataclasses.fields(part):
        readers = readers_said(part, f.name) if hasattr(part, "option_tables") else ""
        said = docs[f.name] + (f" ({readers})" if readers else "")
        rows.append((f"`{f.name}`", shown(f.default), said))
    return table(("option", "default", "what it says"), rows)


def shown(default: Any) -> str:
    if default is None:
        return ""
    return f"`{' '.join(map(str, default)) if isinstance(default, tuple) else default}`"


OF_WHAT = {
    "token": "token",
    "sequence": "completion, the product",
    "geometric": "completion, the geometric mean",
    "probability": "token",
}


def corrections() -> str:
    """A row for each that weighs what was sampled."""
    rows = []
    for name, kind in SAMPLING_CORRECTIONS.items():
        if kind.bound is not None:
            said = " ".join((inspect.getdoc(kind.bound) or "").split()).removesuffix(".")
            reads = name in SAMPLING_CORRECTIONS.readers("sampling_clip_min")
            bounds = f"{kind.clip_min:g}, {kind.clip_max:g}" if reads else ""
            rows.append((f"`{name}`", OF_WHAT[kind.level], said, bounds))
    return table(("`sampling_correction`", "w of a", "weight", "clip_min, clip_max"), rows)


def of_method(method: str, loss: Any) -> dict[str, Callable[[], str]]:
    """What is generated in the page of a method."""
    parts: dict[str, Callable[[], str]] = {
        "options": partial(options_of, loss),
        "differences": partial(differences, loss),
    }
    if "loss_type" in loss.option_tables:
        parts["variants"] = partial(variants, loss, weights=method == "grpo")
    if method == "grpo":
        parts["rollout"] = partial(options_of, RolloutConfig)
        parts["corrections"] = corrections
    return parts


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "coming_from_trl.md": trl_options.PARTS,
    "start/recipes.md": {"recipes": recipes},
    "start/which_method.md": {
        "Qwen2.5-0.5B": partial(models, "Qwen2.5-0.5B"),
        "measured": measured,
        "Llama-3.1-8B": partial(models, "Llama-3.1-8B"),
    },
    "start/options.md": {
        part.__name__: partial(options_of, part) for part in (ModelConfig, DataConfig, TrainConfig, SaveConfig)
    },
    **{f"methods/{method}.md": of_method(method, loss) for method, loss in LOSSES.items()},
}
"""page -> what is generated in it, by the name in its comments."""


def filled(page: str, text: str) -> str:
    """The page's text with its generated parts made anew. ValueError where a part has no place."""
    for name, make in PARTS[page].items():
        begin, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"docs/{page} has no place for {name!r}")
        part = f"{begin}\n{make().strip()}\n\n{end}"
        text = pattern.sub(lambda _, part=part: part, text)  # type: ignore[misc]
    return text


def main() -> int:
    for page in PARTS:
        path = Path("docs") / page
        path.write_text(filled(page, path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
