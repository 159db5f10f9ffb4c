"""`logratio verify`: every loss against its truths, value and whole gradient, through the path that training takes.

Against TRL: the installed trainer's own loss and gradient on the same rows of text, in float32; so tokenization,
packing, shared prompts, reference and head are compared too. Against the oracle: plain unpadded forward passes and the
formulas from the papers, in float64. `cases.py` lists what is compared, `truths.py` computes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, Qwen2Config

from logratio.losses import LOSSES
from logratio.trainers.errors import UserError

from .peers.cases import CASES, Case
from .peers.truths import TRUTHS, Gradient, random_model

BOUNDS = {"trl": 1e-5, "oracle": 1e-10}


def main(argv: list[str] | None = None) -> int:
    """Compare every loss with TRL and with the float64 oracle; status 1 where one is out of bounds."""

    def options(method: str | None = None, seed: int = 0, json: Path | None = None) -> tuple[Any, ...]:
        """Compare losses with TRL and with the float64 oracle.

        Args:
            method: one of sft, dpo, kto, orpo, cpo, tpo, grpo (default: all).
            seed: of weights and rows.
            json: write the rows to this file too.
        """
        return method, seed, json

    method, seed, file = tyro.cli(options, args=argv, prog="logratio verify")
    if method is not None and method not in LOSSES:
        raise UserError(f"unknown method {method!r}, expected one of: {', '.join(LOSSES)}")
    rows = []
    table = Table("method", "variant", "against", "dtype", "loss err", "grad err", "ok", title="relative errors")
    table.columns[1].overflow = "fold"
    cases = [case for case in CASES if method in (None, case.method)]
    for row in verify(cases, seed):
        rows.append(row)
        errors = (f"{row[name]:.1e}" for name in ("loss_rel_err", "grad_rel_err"))
        table.add_row(
            row["method"], row["variant"], row["against"], row["dtype"], *errors, "yes" if row["ok"] else "NO"
        )
    Console().print(table)
    if file is not None:
        file.write_text(json.dumps(rows, indent=1) + "\n")
    for case in cases:
        if case.differs:
            print(f"not compared with TRL: {case.method} {case.name}: {case.differs}")
    alone = sum(case.trl is None for case in cases)
    bad = sum(not row["ok"] for row in rows)
    print(f"{alone} of {len(cases)} cases are of losses or options that TRL has not, and compared with the oracle only")
    print(f"{len(rows) - bad} of {len(rows)} within bounds (TRL {BOUNDS['trl']:g}, oracle {BOUNDS['oracle']:g})")
    return 1 if bad else 0


def verify(
    cases: Sequence[Case],
    seed: int = 0,
    *,
    truths: Sequence[str] = tuple(BOUNDS),
    architectures: Sequence[Any] = (LlamaConfig, Qwen2Config),
) -> Iterator[dict[str, Any]]:
    """One row for each case and truth that it has: the largest error over the models."""
    models = [random_model(kind, seed, adapters=0.2) for kind in architectures]
    for case in cases:
        for against in truths:
            bound = BOUNDS[against]
            if against == "trl" and (case.trl is None or case.differs):
                continue
            errors = [relative_errors(*TRUTHS[against](case, model, seed)) for model in models]
            loss_err, grad_err = (max(column) for column in zip(*errors, strict=True))
            yield {
                "method": case.method,
                "variant": case.name,
                "against": against,
                "dtype": "float32" if against == "trl" else "float64",
                "loss_rel_err": loss_err,
                "grad_rel_err": grad_err,
                "ok": loss_err <= bound and grad_err <= bound,
            }


def relative_errors(ours: Gradient, truth: Gradient) -> tuple[float, float]:
    """Of the loss, over max(|loss|, mean |per-example term|), since terms may cancel; of the gradient, in norm."""
    if set(ours.grads) != set(truth.grads):
        raise AssertionError("the two sides do not train the same parameters")
    names = sorted(ours.grads)
    mine, theirs = (torch.cat([g.grads[name].flatten().double() for name in names]) for g in (ours, truth))
    loss = abs(ours.loss - truth.loss) / max(abs(truth.loss), truth.scale)
    return loss, ((mine - theirs).norm() / theirs.norm()).item()
