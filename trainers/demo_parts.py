"""What the demo's tables and files are made of: scores with their errors, and questions held out."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data.examples import Prompt
from .data.rows import Rows
from .rollout.rewards import exact_answer

VALIDATION_SUMS = 250  # unordered pairs {a, b}, nearly two questions each


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1] and its standard error."""

    accuracy: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} ± {self.standard_error:.3f}"

    def beyond(self, other: Score) -> float:
        """By how many standard errors of the difference this is above `other`, taken as independent."""
        return (self.accuracy - other.accuracy) / math.hypot(self.standard_error, other.standard_error)


def addends(prompt: str) -> frozenset[str]:
    """What a+b and b+a have in common: a model that knows the one mostly knows the other."""
    return frozenset(prompt.removesuffix("=").split("+"))


def clustered(right: Sequence[float], clusters: Sequence[Hashable]) -> Score:
    """The mean of `right`, with the standard error that holds where answers in one cluster are alike."""
    mean = sum(right) / len(right)
    sums: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(right, clusters, strict=True):
        sums[cluster] += value - mean
    variance = sum(s * s for s in sums.values()) * len(sums) / (len(sums) - 1)
    return Score(mean, math.sqrt(variance) / len(right))


def split_validation(rows: Sequence[dict[str, Any]]) -> tuple[Rows, Rows]:
    """(validation, training) questions; a+b and b+a are in the same part."""
    held_out = set(list(dict.fromkeys(addends(row["prompt"]) for row in rows))[:VALIDATION_SUMS])
    validation = [row for row in rows if addends(row["prompt"]) in held_out]
    training = [row for row in rows if addends(row["prompt"]) not in held_out]
    return Rows("validation questions", validation), Rows("training questions", training)


def write(folder: Path, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Every file as NAME.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def grade(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """1 for a right answer, 0 for a wrong one: the reward that GRPO learns from."""
    return [float(x or 0) for x in exact_answer(list(texts), [p.columns["answer"] for p in prompts])]


def preferences(prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The files that the model's mistakes make; an empty answer has no text to learn from, and is in none of them.

    pairs: the right answer and the model's wrong one. labeled: the same as single rows. chosen: right answers only.
    """
    files: dict[str, list[dict[str, Any]]] = {"pairs": [], "labeled": [], "chosen": []}
    for prompt, text, right in zip(prompts, texts, grade(prompts, texts), strict=True):
        if right or not text.strip():
            continue
        question, answer = {"prompt": prompt.prompt}, prompt.columns["answer"]
        files["pairs"].append({**question, "chosen": answer, "rejected": text})
        files["labeled"].append({**question, "completion": answer, "label": True})
        files["labeled"].append({**question, "completion": text, "label": False})
        files["chosen"].append({**question, "completion": answer})
    return files
