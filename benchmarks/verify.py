"""`logratio verify`: every loss against its truths, value and whole gradient, through the path that training takes.

Against the oracle: plain unpadded forward passes and the formulas from the papers, in float64. Against TRL: the
installed trainer's own loss and gradient on the same rows of text, in float32; so tokenization, packing, shared
prompts, reference and head are compared too. How near two float32 sides can be depends on the machine's kernels and
on the loss, whose exponentials enlarge what the log-probs were rounded by. So where they differ by more than the bound,
both are held against the oracle, and must be near it: ours at most twice as far from it as TRL's, which may be near by
luck, or as far as its own formula is where every sequence's log-probs and their sum are off to one side by what
float32 rounds.

`cases.py` lists what is compared, `truths.py` and `randoms.py` make models and rows, `sides.py` computes the losses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from rich.console import Console
from transformers import LlamaConfig, Qwen2Config

from logratio.losses import LOSSES
from logratio.trainers.errors import UserError

from .peers.case import Case
from .peers.cases import CASES
from .peers.sides import oracles, ours, trls
from .peers.truths import Gradient, Subject, difference, subject_of
from .progress import Progress
from .reporting.files import write

BOUNDS = {"trl": 1e-5, "oracle": 1e-10}
TINY = 1e-6
"""What ours may be further from float64 than the budget: some roundings of float32."""
NEAR = 1e-4
"""How far from float64 rounding may take a side; beyond, it computes another formula than the oracle."""
DRAWS = 8
"""How often sides are drawn, of which the largest error counts."""
COLUMNS = "{:<8}  {:<7}  {:<7}  {:<27}  {:<27}  {:<3}  {}"
HEADER = COLUMNS.format("method", "against", "dtype", "loss err (ours, TRL)", "grad err (ours, TRL)", "ok", "variant")


@dataclass
class Options:
    """What to verify."""

    method: str | None = None
    """One of sft, dpo, kto, orpo, cpo, tpo, listwise, grpo (default: all)."""
    only: list[str] = field(default_factory=list)
    """Only variants whose names contain one of these, such as discopop or ld_alpha."""
    seed: int = 0
    """Of weights and rows."""
    json: Path | None = None
    """Write the rows to this file too."""


class Errors(NamedTuple):
    """Of the loss or of the gradient, relative.

    plain: between the two sides. ours, trl: of each against float64. rounding: of float64 with rounded log-probs,
    where it is asked for.
    """

    plain: float
    ours: float | None = None
    trl: float | None = None
    rounding: float = 0.0

    def within(self, bound: float) -> bool:
        """Whether the sides are within the bound; or both near float64, and ours not further than rounding takes it."""
        if self.plain <= bound:
            return True
        if self.ours is None or self.trl is None or not max(self.ours, self.trl) <= NEAR:
            return False
        return self.ours <= max(2 * self.trl, self.rounding) + TINY

    def __str__(self) -> str:
        budget = [] if self.ours is None else [self.ours, self.trl, *([self.rounding] if self.rounding else [])]
        return f"{self.plain:.1e}" + (f" ({', '.join(f'{x:.1e}' for x in budget)})" if budget else "")


KEYS = ("{}_rel_err", "our_{}_err", "trl_{}_err", "rounding_{}_err")
"""What a row calls the fields of `Errors`."""


def main(argv: list[str] | None = None) -> int:
    """Compare every loss with TRL and with the float64 oracle; status 1 where one is out of bounds."""
    options = tyro.cli(Options, args=argv, prog="logratio verify", description=main.__doc__)
    if options.method is not None and options.method not in LOSSES:
        raise UserError(f"unknown method {options.method!r}, expected one of: {', '.join(LOSSES)}")
    cases = [
        case
        for case in CASES
        if options.method in (None, case.method) and (not options.only or any(x in case.name for x in options.only))
    ]
    if not cases:
        raise UserError(f"no variant has a name with {' or '.join(options.only)} in it")
    rows = []
    with Progress(Console(highlight=False), "verify", sum(len(truths_of(case)) for case in cases)) as progress:
        progress.say(
            "Relative errors. In brackets: of ours and of TRL's against float64,\n"
            "and of float64 with rounded log-probs where the two differ.\n" + HEADER
        )
        for row in verify(cases, options.seed):
            rows.append(row)
            progress.step(line(row))
    if options.json is not None:
        write(options.json, (json.dumps(rows, indent=1) + "\n").encode(), "--json")
    for case in cases:
        if case.differs:
            print(f"not compared with TRL: {case.method} {case.name}: {case.differs}")
    alone = sum(case.trl is None for case in cases)
    bad = [row for row in rows if not row["ok"]]
    print(f"{alone} of {len(cases)} cases are of losses or options that TRL has not, and compared with the oracle only")
    for row in bad:
        print(f"out of bounds: {row['method']} {row['variant']} against {row['against']}")
    print(f"{len(rows) - len(bad)} of {len(rows)} within bounds (oracle {BOUNDS['oracle']:g}; TRL {BOUNDS['trl']:g},")
    print(f"or both within {NEAR:g} of float64, ours no further than twice TRL's error or than rounding, + {TINY:g})")
    return 1 if bad else 0


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    errors = [str(Errors(*(row[key.format(name)] for key in KEYS))) for name in ("loss", "grad")]
    ok = "yes" if row["ok"] else "NO"
    return COLUMNS.format(row["method"], row["against"], row["dtype"], *errors, ok, row["variant"])


def truths_of(case: Case, truths: Sequence[str] = tuple(BOUNDS)) -> list[str]:
    """Those that the case is compared with."""
    return [name for name in truths if name != "trl" or (case.trl is not None and not case.differs)]


def verify(
    cases: Sequence[Case],
    seed: int = 0,
    *,
    truths: Sequence[str] = tuple(BOUNDS),
    architectures: Sequence[Any] = (LlamaConfig, Qwen2Config),
) -> Iterator[dict[str, Any]]:
    """One row for each case and truth that it has: the errors of the model that is worst."""
    subjects = [subject_of(kind, seed) for kind in architectures]
    for case in cases:
        exact = [oracles(case, subject) for subject in subjects]
        for against in truths_of(case, truths):
            compare = against_trl if against == "trl" else against_oracle
            pairs = [compare(case, subject, truth) for subject, truth in zip(subjects, exact, strict=True)]
            loss, grad = (worst(errors, BOUNDS[against]) for errors in zip(*pairs, strict=True))
            yield {
                "method": case.method,
                "variant": case.name,
                "against": against,
                "dtype": "float32" if against == "trl" else "float64",
                **{key.format("loss"): value for key, value in zip(KEYS, loss, strict=True)},
                **{key.format("grad"): value for key, value in zip(KEYS, grad, strict=True)},
                "ok": loss.within(BOUNDS[against]) and grad.within(BOUNDS[against]),
            }


def worst(errors: Sequence[Errors], bound: float) -> Errors:
    """One that is out of bounds, if any, else the largest."""
    return max(errors, key=lambda e: (not e.within(bound), e.plain))


def against_oracle(case: Case, subject: Subject, exact: Gradient) -> list[Errors]:
    """The errors of loss and gradient in float64."""
    return [Errors(plain) for plain in relative_errors(ours(case, subject, torch.float64), exact)]


def against_trl(case: Case, subject: Subject, exact: Gradient) -> list[Errors]:
    """The errors of loss and gradient in float32, with those of both sides against float64."""
    mine, theirs = ours(case, subject, torch.float32), trls(case, subject)
    theirs = replace(theirs, scale=exact.scale)
    pairs = ((mine, theirs), (mine, exact), (theirs, exact))
    found = [Errors(*errors) for errors in zip(*(relative_errors(*pair) for pair in pairs), strict=True)]
    if all(errors.plain <= BOUNDS["trl"] for errors in found):
        return found
    drawn = []
    for draw in range(DRAWS):
        with subject.rounded(draw):
            drawn.append(relative_errors(oracles(case, subject), exact))
    return [errors._replace(rounding=max(r)) for errors, r in zip(found, zip(*drawn, strict=True), strict=True)]


def relative_errors(ours: Gradient, truth: Gradient) -> tuple[float, float]:
    """Of the loss, over max(|loss|, mean |per-example term|), since terms may cancel; of the gradient, in norm."""
    loss = abs(ours.loss - truth.loss) / max(abs(truth.loss), truth.scale)
    return loss, difference(ours.grads, truth.grads)
