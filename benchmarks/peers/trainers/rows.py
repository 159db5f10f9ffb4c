"""The atlas's table of whole trainers: which laws each keeps, which it breaks, by how much and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from logratio.losses import LOSSES, Kind
from logratio.reference.laws import LawViolation
from logratio.reference.trainer_laws import Report, Trained, verdicts

from .ours import our_trainer
from .theirs import KINDS, transformers_trainer, trl_trainer


class Subject(NamedTuple):
    """fn, kind and options as of `check_trainer`."""

    fn: Callable[..., Trained]
    kind: str
    options: dict[str, Any]


OPTIONS: dict[str, dict[str, Any]] = {
    "dpo": {"loss_at_start": math.log(2)},
    "kto": {"micro_batch_size": 2},  # TRL refuses it in micro-batches of one row
    "grpo": {"skip": ["gradient"]},  # the value that it reports does not fall
}
SAMPLED = {"skip": ["gradient", "last_window"]}
"""Of GRPO in TRL, whose sampler makes whole windows only."""


def trls(method: str) -> Subject:
    """At DPO's start the policy is the reference, elsewhere it has moved already."""
    fn = trl_trainer(method, adapters=0.0 if method == "dpo" else 0.5)
    return Subject(fn, KINDS.get(method, "paired"), SAMPLED if method == "grpo" else OPTIONS.get(method, {}))


def ours(method: str) -> Subject:
    return Subject(our_trainer(method), KINDS.get(method, "paired"), OPTIONS.get(method, {}))


TRAINERS: dict[str, Subject] = {
    "transformers": Subject(transformers_trainer, "sequence", {}),
    **{f"TRL {method}": trls(method) for method, loss in LOSSES.items() if loss.kind is not Kind.LISTED},
    **{f"ours {method}": ours(method) for method in LOSSES},
}

_NLL = "The NLL is the token mean of the micro-batch, see the splits above"
_KL = "z is of the micro-batch, mismatched within itself, see the splits above."
LAW_REASONS: dict[tuple[str, str], str] = {
    **{(f"TRL {method}", "uneven"): f"{_NLL}." for method in ("cpo", "tpo")},
    ("TRL orpo", "padding"): f"{_NLL}; of prompt and completion, so that it is the prompts that make it uneven.",
    **{("TRL kto", law): _KL for law in ("split", "uneven", "padding", "last_window", "update")},
    ("TRL kto", "order"): "The mismatched completion is the row's before it.",
}
"""(trainer, law) -> why it is broken."""


def measure_trainer(name: str, subject: Subject) -> dict[str, Any]:
    """A row of the table."""
    report = Report()
    row: dict[str, Any] = {"trainer": name, "held": [], "broken": {}, "not_asked": {}}
    for law, verdict in verdicts(subject.fn, subject.kind, shrink_runs=0, report=report, **subject.options):
        if verdict is None:
            row["held"].append(law)
        elif isinstance(verdict, LawViolation):
            row["broken"][law] = str(verdict).splitlines()[1].strip().partition(", most in")[0]
        else:
            row["not_asked"][law] = verdict
    return {**row, "runs": report.runs}


def law_problems(rows: list[dict[str, Any]]) -> list[str]:
    """Where a law is broken without a reason, or by ours, or a reason is given for one that is kept."""
    out = []
    for row in rows:
        name = row["trainer"]
        reasons = {law for trainer, law in LAW_REASONS if trainer == name}
        out += [
            f"{name}: {law} is broken without a reason ({row['broken'][law]})" for law in {*row["broken"]} - reasons
        ]
        out += [f"{name}: {law} is kept, where a reason says that it is not" for law in reasons - {*row["broken"]}]
    return out
