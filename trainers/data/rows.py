"""Where rows come from: the embedded task, a local file or folder, or the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logratio.losses import Kind

from ..errors import UserError, first_line
from .arithmetic import arithmetic_rows

FILE_TYPES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Rows:
    """A data set's rows and the name that messages call it by. lines: each row's line number in a JSON-lines file."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    lines: list[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    def where(self, row: int) -> str:
        """The row's place, as an error's sentence begins with it."""
        return f"{self.name}, line {self.lines[row]}" if self.lines else f"{self.name}, row {row} (counted from 0)"


def load_rows(dataset_name: str, kind: Kind, *, split: str = "train", config: str | None = None, seed: int = 0) -> Rows:
    """The rows of one split of `dataset_name`; never empty.

    dataset_name: `arithmetic` (the embedded task, in the columns of `kind`; `seed` draws its wrong answers), a local
        .jsonl, .json or .parquet file (its one split is "train"), a folder (`{split}.jsonl` and its like, what
        `Dataset.save_to_disk` wrote, or whatever `datasets.load_dataset` can read), or a data set of the Hub.
    split, config: as `datasets.load_dataset` takes them ("train[:10%]" too) for folders and the Hub.
    """
    path = Path(dataset_name)
    if dataset_name == "arithmetic":
        rows = Rows("arithmetic", arithmetic_rows(kind, split, seed))
    elif path.is_file():
        if split != "train":
            raise UserError(
                f"{path} is a single file, which has the split 'train' only, not {split!r}: name another file"
            )
        rows = _read_file(path)
    elif path.is_dir():
        rows = _read_folder(path, split, config)
    elif path.suffix in FILE_TYPES or dataset_name.startswith((".", "/", "~")):
        raise UserError(f"the data file {dataset_name} does not exist (looked in {Path.cwd()})")
    else:
        rows = Rows(f"{dataset_name} ({split})", _load(dataset_name, split, config))
    if not len(rows):
        raise UserError(f"{rows.name} has no rows")
    return rows


def _read_file(path: Path) -> Rows:
    if path.suffix == ".parquet":
        return Rows(str(path), _read_parquet(path))
    if path.suffix not in FILE_TYPES:
        raise UserError(f"{path} is no data file of a known type: expected {', '.join(FILE_TYPES)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        rows, lines = _parse_json(text, str(path), f"{path}, line {{}}"), None
        if not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path} must hold a list of objects, one for each row")
        return Rows(str(path), rows, lines)
    # Not str.splitlines(), which would also cut at line separators that JSON allows inside strings.
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows = []
    for number, line in numbered:
        row = _parse_json(line, str(path), f"{path}, line {number}")
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} must be one object, {{...}}, got {type(row).__name__}")
        rows.append(row)
    return Rows(str(path), rows, [number for number, _ in numbered])


def _parse_json(text: str, path: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place.format(error.lineno)}, column {error.colno} is not valid JSON: {error.msg}") from None


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.lib.ArrowException as error:
        raise UserError(f"{path} cannot be read as parquet: {first_line(error)}") from None


def _read_folder(path: Path, split: str, config: str | None) -> Rows:
    named = [path / f"{split}{suffix}" for suffix in FILE_TYPES if (path / f"{split}{suffix}").is_file()]
    if len(named) == 1 and config is None:
        return _read_file(named[0])
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return Rows(f"{path} ({split})", _load_from_disk(path, split))
    return Rows(f"{path} ({split})", _load(str(path), split, config))


def _load_from_disk(path: Path, split: str) -> Any:
    import datasets

    stored = datasets.load_from_disk(str(path))
    if isinstance(stored, datasets.DatasetDict):
        if split not in stored:
            raise UserError(f"{path} has no split {split!r}, only {', '.join(map(repr, stored))}")
        return stored[split]
    if split != "train":
        raise UserError(f"{path} holds a single data set, which has the split 'train' only, not {split!r}")
    return stored


def _load(name: str, split: str, config: str | None) -> Any:
    import datasets

    # datasets reports what is wrong with a name, a split, a configuration, a file or the network by as many types
    # of exceptions, most of them ValueError or OSError; each says in its first line what it missed.
    try:
        return datasets.load_dataset(name, config, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the data set {name!r} (split {split!r}) cannot be loaded: {first_line(error)}; expected 'arithmetic', "
            f"a file ({', '.join(FILE_TYPES)}), a folder, or a data set of the Hub that can be reached"
        ) from error
