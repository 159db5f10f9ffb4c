"""The same pairs for every contestant, in the columns that it needs and in one order for each seed.

Of one pair become: a sequence (the prompt with its chosen completion), the pair itself, a list of the two with rewards
1 and 0, two labeled rows next to each other, or a prompt with the other columns for rewards. So the k-th step of all
contestants is about the same pairs.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logratio.losses import Kind
from logratio.trainers.data.rows import EMBEDDED, load_rows
from logratio.trainers.errors import RowError, UserError

from ..reporting.files import write as write_whole

Row = Mapping[str, Any]
ANSWERS = ("chosen", "rejected", "reference")
MARGIN = "margin"
"""Of a pair: a column that a loss which does not read it refuses, though others here may need it."""
ROWS_OF_A_PAIR = {Kind.LABELED: 2}
"""How many rows a pair becomes, where that is not one."""


@dataclass(frozen=True)
class Material:
    """train, held_out: pairs. demonstrations: what the embedded model is taught first, where it is to be."""

    train: list[Row]
    held_out: list[Row]
    demonstrations: list[Row]

    @property
    def columns(self) -> set[str]:
        """Beside the prompt, what rewards are given."""
        return set(self.held_out[0]) - {"prompt", *ANSWERS, MARGIN}

    def digest(self) -> str:
        """Of what the rows say, wherever they came from."""
        said = json.dumps([self.train, self.held_out, self.demonstrations], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]


def material(dataset: str, split: str, test_split: str | None, eval_rows: int) -> Material:
    """The pairs of a data set, of which `eval_rows` are held out: the first of the test split, or by lot. UserError
    where they are no pairs with a prompt, or too few."""
    train = pairs(dataset, split)
    if dataset in EMBEDDED and test_split is None:
        test_split = "test"
    if test_split is not None:
        held_out = pairs(dataset, test_split)[:eval_rows]
    else:
        random.Random("held out").shuffle(train)
        held_out, train = train[:eval_rows], train[eval_rows:]
        if len(train) < 2:
            raise UserError(
                f"{dataset} has {len(held_out) + len(train)} rows, of which --eval_rows {eval_rows} leaves too few "
                "to train on"
            )
    if len(held_out) < 2:
        raise UserError(
            f"{dataset}: {len(held_out)} held-out row is too few to say how sure anything is; hold out more"
        )
    shown = list(load_rows(dataset, Kind.SEQUENCE, split=split)) if dataset in EMBEDDED else None
    return Material(train, held_out, shown or as_kind(train, Kind.SEQUENCE))


def pairs(dataset: str, split: str) -> list[Row]:
    """Rows with prompt, chosen and rejected. UserError for others."""
    rows = load_rows(dataset, Kind.PAIRED, split=split)
    found = []
    for index, row in enumerate(rows):
        if isinstance(row, RowError):
            raise row
        missing = [name for name in ("prompt", "chosen", "rejected") if row.get(name) is None]
        if missing:
            raise UserError(
                f"{rows.where(index)} has no {missing[0]!r}: contestants are compared on pairs, with the columns "
                "prompt, chosen and rejected, of which each takes what it needs"
            )
        found.append(row)
    return found


def as_kind(rows: Sequence[Row], kind: Kind, *, margin: bool = False) -> list[Row]:
    """Pairs in the columns of another kind, in their order. margin: of pairs, whether their margin is read."""
    if kind is Kind.PAIRED:
        return [{name: value for name, value in row.items() if margin or name != MARGIN} for row in rows]
    found: list[Row] = []
    for row in rows:
        rest = {name: value for name, value in row.items() if name not in (*ANSWERS, MARGIN)}
        if kind is Kind.GROUPED:
            found.append(rest)
        elif kind is Kind.SEQUENCE:
            found.append({**rest, "completion": row["chosen"]})
        elif kind is Kind.LISTED:
            found.append({**rest, "completions": [row["chosen"], row["rejected"]], "rewards": [1.0, 0.0]})
        else:
            found.append({**rest, "completion": row["chosen"], "label": True})
            found.append({**rest, "completion": row["rejected"], "label": False})
    return found


def ordered(rows: Sequence[Row], seed: int) -> list[Row]:
    """In the order of a seed, which all contestants have."""
    shuffled = list(rows)
    random.Random(f"order/{seed}").shuffle(shuffled)
    return shuffled


def write(path: Path, rows: Sequence[Row]) -> None:
    """As JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode(), "--output_dir")
