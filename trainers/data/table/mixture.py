"""Several data sets as one: which they are, and in which proportions their rows are drawn.

Without weights an epoch is every row of every data set, once. With weights w of data sets that have n examples each, an
epoch is the longest in which the proportions are those of the weights and no example comes twice: it has
round(w_i / sum(w) x T) examples of each, where T = min_i n_i / (w_i / sum(w)). The data set that sets T is used up; of
the others, the next epoch takes the examples that follow, so that all of them come before any comes again. Each passes
through its examples in an order of its own, and an epoch's examples are shuffled among each other.

That is TRL's `fraction` (1.16), but for what TRL leaves out: there every epoch has the first rows of each data set.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ...config import DataConfig
from ...errors import UserError
from .stored import Examples, Table

FOREIGN = {
    "data_dir": "name the folder as its path",
    "data_files": "name the file as its path, or one data set for each",
}
"""What TRL's `DatasetConfig` has beyond ours, and what to do instead."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One of the data sets of a run, as TRL's `DatasetConfig`, which has no revision, calls its parts.

    fraction: its weight."""

    path: str
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    columns: tuple[str, ...] | None = None
    fraction: float | None = None


def data_sets(options: DataConfig) -> list[DataSet]:
    """Those that the options name. Raises UserError where they contradict each other."""
    if options.datasets is None:
        weights = options.dataset_weights or [None] * len(options.dataset_name)
        if len(weights) != len(options.dataset_name):
            raise UserError(
                f"--dataset_weights has {len(weights)} numbers for {len(options.dataset_name)} data sets in "
                "--dataset_name"
            )
        shared = {"name": options.dataset_config, "revision": options.dataset_revision}
        shared["split"] = options.dataset_train_split
        found = [
            DataSet(path=path, fraction=weight, **shared)  # type: ignore[arg-type]
            for path, weight in zip(options.dataset_name, weights, strict=True)
        ]
    else:
        for name in ("dataset_name", "dataset_config", "dataset_revision", "dataset_train_split", "dataset_weights"):
            if getattr(options, name) != getattr(DataConfig, name):
                raise UserError(f"--{name} and --datasets both say what to train on; leave one of them out")
        found = [_data_set(text) for text in options.datasets]
    if not found:
        raise UserError("--dataset_name names no data set: name a file, a folder or a data set of the Hub")
    given = [one.fraction for one in found if one.fraction is not None]
    if given and len(given) < len(found):
        raise UserError("--datasets: 'fraction' stands at some data sets and not at others; give each one its own")
    for weight in given:
        if not 0 < weight < math.inf:
            raise UserError(f"the weight {weight} of a data set must be a finite number above 0; leave the set out")
    return found


def _data_set(text: str) -> DataSet:
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise UserError(f"--datasets: {text!r} is no object such as {{path: rows.jsonl, fraction: 0.5}}")
    known = [f.name for f in fields(DataSet)]
    for key in said:
        if key in FOREIGN:
            raise UserError(f"--datasets: {key!r} is not supported; {FOREIGN[key]}")
        if key not in known:
            raise UserError(f"--datasets: unknown key {key!r}, expected one of: {', '.join(known)}")
    said = {key: value for key, value in said.items() if value is not None}
    kinds = {"path": str, "name": str, "revision": str, "split": str, "columns": list, "fraction": (int, float)}
    for key, value in said.items():
        if not isinstance(value, kinds[key]) or isinstance(value, bool):  # type: ignore[arg-type]
            raise UserError(f"--datasets: {key!r} cannot be {value!r}")
    if "path" not in said:
        raise UserError(f"--datasets: {text} has no 'path'")
    if "columns" in said:
        said["columns"] = tuple(map(str, said["columns"]))
    return DataSet(**said)


class Mixture(Examples):
    """All examples of several data sets, of which an epoch draws some. shares: how many of each table's."""

    def __init__(
        self, tables: Sequence[Table], names: Sequence[str], weights: Sequence[float], chosen: Any = None
    ) -> None:
        super().__init__(tables, names, chosen)
        number = np.searchsorted(self.starts, np.arange(self.starts[-1]) if chosen is None else chosen, "right") - 1
        self._own = [np.flatnonzero(number == n) for n in range(len(tables))]
        parts = [weight / math.fsum(weights) for weight in weights]
        total = min(len(own) / part for own, part in zip(self._own, parts, strict=True))
        self.shares = [min(round(part * total), len(own)) for own, part in zip(self._own, parts, strict=True)]
        for name, share in zip(names, self.shares, strict=True):
            if not share:
                raise UserError(
                    f"of {name} no example would be drawn in an epoch: give it more weight, or leave it out"
                )

    @property
    def epoch_size(self) -> int:
        """How many examples an epoch has."""
        return sum(self.shares)

    def order(self, epoch: int, *, shuffle: bool, seed: int) -> list[int]:
        """Which examples an epoch has, in its order: for `setup.batches`."""
        drawn: list[int] = []
        for number, (own, share) in enumerate(zip(self._own, self.shares, strict=True)):
            at, end = epoch * share, (epoch + 1) * share
            while at < end:
                passed, place = divmod(at, len(own))
                order = list(range(len(own)))
                if shuffle:
                    random.Random(f"{seed}-{number}-{passed}").shuffle(order)
                taken = order[place : place + end - at]
                drawn += own[taken].tolist()
                at += len(taken)
        if shuffle:
            random.Random(f"{seed}-{epoch}").shuffle(drawn)
        return drawn

    def describe(self) -> str:
        """What an epoch draws."""
        parts = [
            f"{share} of the {len(own)} examples of {name}"
            for share, own, name in zip(self.shares, self._own, self.names, strict=True)
        ]
        return f"an epoch draws {', '.join(parts)}"
