"""Another project's function held to the laws: which it keeps, which it breaks and how, which cannot be asked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from logratio.losses.types import Loss
from logratio.reference.function_laws import advantage, kernel
from logratio.reference.laws import LAWS, LawViolation, check_advantage, check_kernel, laws_of
from logratio.trainers.ground.provenance import installed

from . import of_liger, of_openrlhf, of_ours, of_torchtune, of_trl, of_verl
from .examples import examples
from .installed import PROJECTS
from .subjects import OURS, Subject

SUBJECTS: dict[str, Callable[[], list[Subject]]] = {
    "ours": of_ours.subjects,
    "TRL": of_trl.subjects,
    "Liger": of_liger.subjects,
    "verl": of_verl.subjects,
    "OpenRLHF": of_openrlhf.subjects,
    "torchtune": of_torchtune.subjects,
}
FLOAT32 = 1e-6
"""Relative difference of values that some compute in float32 whatever they are given: no break."""
LONGEST = 160
"""Characters of what a law says, beyond which it is cut."""


def measure_subject(subject: Subject) -> dict[str, Any]:
    """A row: held, broken (law -> what was seen), not_asked (law -> why)."""
    row: dict[str, Any] = {"project": subject.project, "what": subject.what, "name": subject.name}
    row |= {"held": [], "broken": {}, "not_asked": {}}
    with subject.opened() as fn:
        for law, why, verdict in _asked(subject, fn):
            if why:
                row["not_asked"][law] = why
            elif verdict:
                row["broken"][law] = shortened(verdict)
            else:
                row["held"].append(law)
    return row


def _asked(subject: Subject, fn: Any) -> Iterator[tuple[str, str, str]]:
    """(law, why it is not asked, what was seen where it is broken)."""
    if subject.what == "loss":
        for law in laws_of(fn):
            why = {**OURS, **subject.not_asked}.get(law, "")
            yield law, why, "" if why else seen(lambda law=law: hold_loss(law, fn))  # type: ignore[misc]
        return
    of_advantages = subject.what == "advantage"
    laws: list[str] = [*(advantage.LAWS if of_advantages else kernel.LAWS)]
    check: Callable[..., Any] = check_advantage if of_advantages else check_kernel
    for law in laws:
        try:
            said = seen(lambda law=law: check(fn, laws=[law], **subject.claims))  # type: ignore[misc]
        except ValueError as error:  # it cannot be asked
            yield law, str(error).partition(": ")[2], ""
        else:
            yield law, "", said


def hold_loss(law: str, loss: Loss) -> None:
    """Raise AssertionError for the first of the fixed examples that breaks the law."""
    for example in examples(law, loss.kind):
        LAWS[law].check(loss, **example)


def rounding(said: str) -> bool:
    """Whether what is said is no more than float32 rounds, of a value or of a gradient."""
    pair = re.fullmatch(r"the loss is (\S+), expected (\S+)", said)
    if pair is not None:
        return math.isclose(*map(float, pair.groups()), rel_tol=FLOAT32)
    return (lists := gradients(said)) is not None and apart(*lists[1:]) <= FLOAT32


def gradients(said: str) -> tuple[str, torch.Tensor, torch.Tensor] | None:
    """Whose gradient was seen, what was seen, and what was expected."""
    found = re.fullmatch(r"(the gradient of .*) is (\[.*\]), expected (\[.*\])", said)
    if found is None:
        return None
    got, expected = (torch.tensor([float(x) for x in re.findall(r"[-+.\w]+", part)]) for part in found.groups()[1:])
    return found[1], got, expected


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected|; NaN where one is not finite."""
    return ((got - expected).norm() / expected.norm()).item()


def seen(attempt: Callable[[], Any]) -> str:
    """What an attempt says of a broken law, "" where it is held."""
    try:
        attempt()
    except AssertionError as error:
        said = str(error).partition(": ")[2]
        said = (said.splitlines()[1] if isinstance(error, LawViolation) else said.splitlines()[0]).strip()
        return "" if rounding(said) else said
    except (RuntimeError, TypeError, IndexError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def shortened(text: str) -> str:
    """Numbers to six digits, lists as how far they are apart, and no more than a line."""
    text = text.partition(" tensor(")[0]
    if found := gradients(text):
        name, got, expected = found
        if (count := int((~got.isfinite()).sum())) > 0:
            return f"{name} is not finite at {count} of {len(got)} tokens"
        return f"{name} is off by {100 * apart(got, expected):.2g} %"
    if lists := re.fullmatch(r"(the gradient of .*) is (\[.*\])", text):
        return f"{lists[1]} is not finite"
    text = re.sub(r"-?\d+\.\d{6,}(e[-+]\d+)?", lambda found: f"{float(found[0]):.6g}", text)
    return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + " …"


def measure_projects(told: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """All that the tables say, ready for JSON. told: is given each project's name before it is measured."""
    rows = []
    versions = {project: version for project, (name, _) in PROJECTS.items() if (version := installed(name))}
    for project, subjects in SUBJECTS.items():
        if project in versions or project == "ours":
            told(project)
            rows += [measure_subject(subject) for subject in subjects()]
    return {"versions": versions, "rows": rows}
