"""`logratio atlas`: every loss that TRL or Liger has too, measured against theirs, and why the ones that differ do.

Six tables. Variants: loss and gradient of one batch, ours against each peer's, equal or different with the reason.
Splits: how far each one's gradient moves when the same batch is cut in micro-batches, as its user would accumulate.
Faults: inputs at which a peer is not finite, wrong, or raises, and what comes out here. Laws: which laws of whole
trainers each one's trainer keeps. Projects: which laws their functions keep, verl's and others' too. Runs: what TRL
does around its loss. A verdict is a measurement: one without its reason in `peers/reasons.py`,
`peers/trainers/rows.py` or `projects/reasons.py`, or a reason without its measurement, is an error (status 1).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from logratio.reference import trl
from logratio.trainers.errors import UserError
from logratio.trainers.ground.provenance import installed

from .peers import peers
from .peers.compared import ATLAS, Asked, Compared
from .peers.reasons import REASONS, SPLIT_REASONS
from .peers.text import markdown
from .peers.trainers.rows import LAW_REASONS, TRAINERS, law_problems, measure_trainer
from .peers.truths import Gradient, difference
from .progress import Progress
from .projects.faults import FAULTS, measure_fault
from .projects.installed import PROJECTS
from .projects.measured import measure_projects
from .projects.reasons import project_problems
from .projects.text import project_tables, run_text
from .projects.trl_runs import measure_runs
from .reporting import drawing
from .verify import relative_errors

EQUAL = 1e-4
"""Relative error in float32 up to which two losses, or two gradients, are the same."""
CLEAR = 10
"""How many times that it takes to be different."""
PEERS = {"trl": peers.trls, "liger": peers.ligers}
PARTS = ("variants", "faults", "laws", "projects", "runs")
"""What `--part` measures again."""


def main(argv: list[str] | None = None) -> int:
    """Measure, write docs/atlas.json, docs/atlas.md and its plots; status 1 where a reason does not fit."""

    def options(method: str | None = None, part: str | None = None, out: Path = Path("docs")) -> tuple[Any, ...]:
        """Measure every loss against TRL's and Liger's, and say why those that differ do.

        Args:
            method: only this one of sft, dpo, kto, orpo, cpo, tpo, grpo, and write nothing.
            part: measure only this one of variants, faults, laws, projects, runs, and keep the others of out.
            out: folder of atlas.json, atlas.md and its plots.
        """
        return method, part, out

    method, part, out = tyro.cli(options, args=argv, prog="logratio atlas")
    known = dict.fromkeys(case.method for case in ATLAS)  # TRL and Liger have no losses of lists
    if method is not None and method not in known:
        raise UserError(f"unknown method {method!r}, expected one of: {', '.join(known)}")
    if part is not None and (part not in PARTS or method is not None):
        raise UserError(f"--part {part}: expected one of {', '.join(PARTS)}, and no --method beside it")
    if installed("liger-kernel") != peers.LIGER_VERSION:
        raise UserError(
            f"the atlas needs liger-kernel=={peers.LIGER_VERSION}, found {installed('liger-kernel')}: "
            "pip install -e '.[peers]' in the checkout"
        )
    if method is None:
        with drawing():
            from .reporting.atlas_plots import draw
    kept = json.loads((out / "atlas.json").read_text()) if part else {"faults": [], "laws": []}
    if part and kept["versions"] != peers.versions():
        raise UserError(f"{out}/atlas.json is of {kept['versions']}, here is {peers.versions()}: measure all parts")
    parts = [part] if part else PARTS if method is None else ["variants"]
    atlas = kept | measure(parts, [case for case in ATLAS if method in (None, case.method)])
    Console(highlight=False).print(page(atlas), markup=False, soft_wrap=True)
    wrong = problems(atlas)
    if method is None:
        wrong += stale(atlas)
    for line in wrong:
        print(f"error: {line}")
    if method is None and not wrong:
        out.mkdir(parents=True, exist_ok=True)
        (out / "atlas.json").write_text(json.dumps(atlas, indent=1) + "\n")
        (out / "atlas.md").write_text(page(atlas))
        draw(atlas, out)
    return 1 if wrong else 0


def measure(parts: Sequence[str], compared: Sequence[Compared]) -> dict[str, Any]:
    """The tables of these parts, and what stands above them; ready for JSON."""
    torch.set_num_threads(1)
    atlas: dict[str, Any] = {
        "command": "logratio atlas",
        "versions": peers.versions(),
        "trl_pinned": trl.TRL_VERSION,
        "batch": peers.BATCH,
        "parts": peers.PARTS,
        "equal": EQUAL,
    }
    if "variants" in parts:
        found = each("variants", {case.name: partial(measure_one, case) for case in compared}, verdicts)
        atlas |= {"variants": [row for rows, _ in found for row in rows], "splits": [split for _, split in found]}
    if "faults" in parts:
        atlas["faults"] = each("faults", {fault.name: partial(measure_fault, fault) for fault in FAULTS})
    if "laws" in parts:
        atlas["laws"] = each("laws", {name: partial(measure_trainer, name, one) for name, one in TRAINERS.items()})
    if "projects" in parts:
        with Progress(Console(stderr=True), "projects", len(PROJECTS)) as progress:
            atlas["projects"] = measure_projects(progress.begin)
    if "runs" in parts:
        atlas["runs"] = measure_runs()
    return atlas


def each(what: str, works: Mapping[str, Callable[[], Any]], said: Callable[[Any], str] = lambda found: "") -> list[Any]:
    """What comes of each, with a line when it is there. said: what of it the line says behind the name."""
    found = []
    with Progress(Console(stderr=True), what, len(works)) as progress:
        for name, work in works.items():
            progress.begin(name)
            found.append(work())
            progress.step(f"{what}: {': '.join(filter(None, [name, said(found[-1])]))}")
    return found


def verdicts(found: tuple[list[dict[str, Any]], Any]) -> str:
    return ", ".join(f"{row['peer']} {row['verdict']}" for row in found[0])


def page(atlas: dict[str, Any]) -> str:
    """docs/atlas.md."""
    more = {"projects": project_tables, "runs": run_text}
    return "\n".join([markdown(atlas), *(table(atlas[name]) for name, table in more.items() if name in atlas)])


def measure_one(case: Compared) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each peer that has the loss; and one of all changes under a split."""
    whole, split = (peers.ours(case.method, case.options, parts) for parts in (1, peers.PARTS))
    rows: list[dict[str, Any]] = []
    changes: dict[str, Any] = {
        "variant": case.name,
        "ours": rounded(difference(split.grads, whole.grads)),
        "reasons": {},
    }
    scale = 0.0
    asked: dict[str, Asked | None] = {"trl": case.trl, "liger": case.liger}
    for peer, name_and_options in asked.items():
        if name_and_options is None:
            continue
        row: dict[str, Any] = {"variant": case.name, "peer": peer, "our_loss": rounded(whole.loss, 6)}
        try:
            theirs, cut = (PEERS[peer](*name_and_options, parts) for parts in (1, peers.PARTS))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            row |= {"verdict": "refused", "error": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
        else:
            # Liger's own |loss| is no measure where terms of both signs cancel
            scale = max(scale, theirs.scale)
            errors = relative_errors(whole, Gradient(theirs.loss, scale, theirs.grads))
            row |= {
                "loss": rounded(theirs.loss, 6),
                "loss_rel_err": rounded(errors[0]),
                "grad_rel_err": rounded(errors[1]),
            }
            row["verdict"] = "equal" if max(errors) <= EQUAL else "different"
            changes[peer] = rounded(difference(cut.grads, theirs.grads))
            if changes[peer] > EQUAL:
                changes["reasons"][peer] = SPLIT_REASONS.get((peer, case.name), "")
        row["reason"] = "" if row["verdict"] == "equal" else REASONS.get((peer, case.name), "")
        rows.append(row)
    return rows, changes


def rounded(value: float, digits: int = 2) -> float:
    """To so many significant digits: what is below is rounding of the machine."""
    return float(f"{value:.{digits}g}")


def problems(atlas: dict[str, Any]) -> list[str]:
    """Where a measurement and what is said of it do not fit."""
    out = []
    for row in atlas["variants"]:
        name, verdict = f"{row['peer']}, {row['variant']}", row["verdict"]
        known = (row["peer"], row["variant"]) in REASONS
        if verdict != "equal" and not row["reason"]:
            out.append(f"{name}: {verdict} without a reason ({row.get('error') or row.get('grad_rel_err')})")
        elif verdict == "equal" and known:
            out.append(f"{name}: equal, where a reason says that it is not")
        elif verdict == "different" and max(row["loss_rel_err"], row["grad_rel_err"]) < CLEAR * atlas["equal"]:
            out.append(f"{name}: neither equal nor clearly different ({row['grad_rel_err']})")
        elif known and row["reason"].startswith("Refused") != (verdict == "refused"):
            out.append(f"{name}: {verdict}, which is not what its reason says")
    for row in atlas["splits"]:
        if row["ours"] > atlas["equal"]:
            out.append(f"ours, {row['variant']}: a split changes the gradient by {row['ours']}")
        for peer in PEERS:
            known, moved = (peer, row["variant"]) in SPLIT_REASONS, row.get(peer, 0.0) > atlas["equal"]
            if moved != known:
                out.append(f"{peer}, {row['variant']}: a split changes it by {row.get(peer)}, reason known: {known}")
    for row in atlas["faults"]:
        for peer in ("trl", "liger"):
            if peer in row and row[peer]["sound"]:
                out.append(f"{peer}, {row['fault']}: no fault was seen ({row[peer]['shown']})")
        if not row["ours"]["sound"]:
            out.append(f"ours, {row['fault']}: {row['ours']['shown']}")
    return out + law_problems(atlas["laws"]) + project_problems(atlas.get("projects", {"rows": []})["rows"])


def stale(atlas: dict[str, Any]) -> list[str]:
    """Reasons for rows that are not there."""
    rows = {(row["peer"], row["variant"]) for row in atlas["variants"]}
    rows |= {(name, law) for name, law in LAW_REASONS if name in TRAINERS}
    return [f"{peer}, {name}: a reason for no row" for peer, name in {*REASONS, *SPLIT_REASONS, *LAW_REASONS} - rows]
