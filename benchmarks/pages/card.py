"""README.md of a run's folder: a model card in the form of Hugging Face's hub, out of what the run has written.

One that somebody has written, or has changed since, is left as it is: the card's first comment has a hash of the rest.
PEFT's empty form, which it saves beside every adapter, is replaced.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from logratio.trainers.errors import UserError, counted

from .options import options
from .runs import Run, section, sets_of
from .words import number, plain

FILE = "README.md"
MARK = re.compile(r"<!-- written by `logratio report`, sha256 ([0-9a-f]{16}); edited, it is left alone -->\n")
METRICS = (
    *("loss", "eval_loss", "rewards/accuracies", "eval_rewards/accuracies", "rewards/margins", "eval_rewards/margins"),
    *("reward", "eval_reward", "kl", "mean_token_accuracy", "completions/mean_length"),
)
USE = {
    True: "from peft import AutoPeftModelForCausalLM\n"
    "from transformers import AutoTokenizer\n\n"
    "model = AutoPeftModelForCausalLM.from_pretrained({0!r})\n"
    "tokenizer = AutoTokenizer.from_pretrained({0!r})",
    False: "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    "model = AutoModelForCausalLM.from_pretrained({0!r})\n"
    "tokenizer = AutoTokenizer.from_pretrained({0!r})",
}


def write_card(run: Run) -> str:
    """Write the run's card; returns what became of it, in words."""
    path = run.folder / FILE
    if not run.saved:
        return "no model card: no model is saved there yet"
    if path.exists() and not replaceable(path.read_text(encoding="utf-8", errors="replace")):
        return f"{path} was written or changed by hand, and is left as it is"
    partial = path.with_name(f".{FILE}")
    try:
        partial.write_text(card(run), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written: {error.strerror}") from error
    return str(path)


def replaceable(text: str) -> bool:
    """Whether nobody has written in it: it is ours as we wrote it, or PEFT's form as PEFT fills it."""
    if found := MARK.search(text):
        return found[1] == digest(text[: found.start()] + text[found.end() :])
    if not text.strip():
        return True
    form = ModelCard.from_template(ModelCardData()).text
    return _body(text).split() == _body(form).split()


def _body(text: str) -> str:
    """Without the front matter, and without the versions that PEFT adds."""
    return re.sub(r"\A\s*---\n.*?\n---\n", "", text, flags=re.DOTALL).partition("### Framework versions")[0]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def card(run: Run) -> str:
    """The whole of README.md."""
    front = f"---\n{ModelCardData(**data_of(run)).to_yaml()}\n---\n\n"
    body = "\n\n".join(part for part in body_of(run) if part) + "\n"
    body = body.encode("utf-8", "replace").decode()  # without halves of characters, which JSON can hold
    mark = f"<!-- written by `logratio report`, sha256 {digest(front + body)}; edited, it is left alone -->\n"
    return front + mark + body


def data_of(run: Run) -> dict[str, Any]:
    """The front matter: names that the hub may know, no paths of this machine."""
    adapter = (run.folder / "adapter_config.json").is_file()
    base = str(run.option("model", "model_name_or_path"))
    kinds = run.option("loss", "loss_type")
    tags = ["logratio", run.method, *(kinds if isinstance(kinds, list) else [kinds] if kinds else [])]
    here = began_in(run)
    data = [name for name in data_sets(run) if on_hub(name, here)]
    return {
        **({"base_model": base} if on_hub(base, here) else {}),
        "library_name": "peft" if adapter else "transformers",
        **({"datasets": data} if data else {}),
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys([*tags, *(["lora"] if adapter else [])])),
    }


def data_sets(run: Run) -> list[str]:
    return [str(name) for name in run.option("data", "dataset_name") or ()]


def began_in(run: Run) -> Path:
    """The folder that the run's paths are relative to, as far as its own shows it."""
    own, told = run.folder.resolve().parts, Path(str(run.option("train", "output_dir") or "")).parts
    return Path(*own[: -len(told)]) if told and own[-len(told) :] == told and len(own) > len(told) else Path()


def on_hub(name: str, here: Path) -> bool:
    """Whether it is written as OWNER/NAME, and is no folder or file of the place where the run began."""
    if name.count("/") != 1 or (here / name).exists() or Path(name).suffix in (".jsonl", ".json", ".parquet", ".gz"):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def body_of(run: Run) -> list[str]:
    """The text, part by part."""
    adapter = (run.folder / "adapter_config.json").is_file()
    name = run.folder.resolve().name
    base = str(run.option("model", "model_name_or_path"))
    start = "the embedded model of `logratio`, with random weights" if base == "tiny" else f"`{shown_name(base)}`"
    data = ", ".join(f"`{shown_name(one)}`" for one in data_sets(run))
    kind = "An adapter (LoRA)" if adapter else "A model"
    told = [option for option in options([run]) if option.told and not option.name.endswith("_name_or_path")]
    last = [(metric, run.last(metric)) for metric in METRICS]
    packages = section(run.about, "versions")
    return [
        f"# {name}",
        f"{kind} trained by `logratio train {run.method}` from {start} on {data}, "
        f"for {counted(run.last_step, 'step')}.",
        "## Use\n\nFrom the directory that the folder lies in, or with its name on the Hub:\n\n"
        f"```python\n{USE[adapter].format(name)}\n```",
        "## Results\n\nThe last values of the log, `metrics.jsonl`.\n\n"
        + table(("metric", "value"), [(f"`{metric}`", number(value)) for metric, value in last if value is not None]),
        data_part(run),
        "## Training\n\nOptions that differ from the defaults; all of them are in `run_config.json`.\n\n"
        + table(("option", "value"), [(f"`{o.name}`", f"`{shown_name(o.values[0])}`") for o in told]),
        "## Versions\n\n"
        + table(("", ""), [("commit", plain(run.about.get("commit"))), *((k, plain(v)) for k, v in packages.items())]),
    ]


def data_part(run: Run) -> str:
    """What became of the rows."""
    lines = []
    for one in sets_of(section(run.card, "train")):
        counts = [f"{counted(one['examples'], 'example')}"]
        for key, words in COUNTED.items():
            if one.get(key):
                counts.append(f"{one[key]:,} {words}")
        lines.append(f"- `{shown_name(str(one.get('name')))}`: {', '.join(counts)}")
    return "## Data\n\n" + "\n".join(lines) if lines else ""


COUNTED = {
    "truncated": "completions truncated",
    "dropped": "dropped, with nothing scored within max_length",
    "skipped": "rows skipped",
    "identical": "pairs with identical completions",
}


def shown_name(name: str) -> str:
    """Of a path on this machine only its last part; no character that would end a cell or a code span."""
    name = Path(name).name if Path(name).is_absolute() else name
    return re.sub(r"[`|\n]", " ", name)


def table(head: tuple[str, str], lines: list[tuple[str, str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ("---", "---"), *lines))
