"""Where rows come from: the embedded task, a local file or folder, or the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logratio.losses import Kind

from ..errors import UserError, first_line
from .arithmetic import arithmetic_rows
from .files import FILE_TYPES, file_type, read_file


@dataclass(frozen=True)
class Rows:
    """A data set's rows and the name that messages call it by.

    rows: each a mapping from columns to values; in place of one that could not be read, its RowError.
    lines: each row's line number in a JSON-lines file.
    """

    name: str
    rows: Sequence[Any]
    lines: list[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        rows, index = iter(self.rows), 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # datasets reads and decodes (images, audio) only here
                raise UserError(f"{self.where(index)} cannot be read: {_said(error)}") from error
            yield row
            index += 1

    def where(self, row: int) -> str:
        """The row's place, as an error's sentence begins with it."""
        return f"{self.name}, line {self.lines[row]}" if self.lines else f"{self.name}, row {row} (counted from 0)"


def load_rows(
    dataset_name: str,
    kind: Kind,
    *,
    split: str = "train",
    config: str | None = None,
    seed: int = 0,
    keep_bad: bool = False,
) -> Rows:
    """The rows of one split of `dataset_name`; never empty.

    dataset_name: `arithmetic` (the embedded task, in the columns of `kind`; `seed` draws its wrong answers), a local
        file of one of `FILE_TYPES` (its one split is "train"), a folder (`{split}.jsonl` and its like, what
        `Dataset.save_to_disk` wrote, or whatever `datasets.load_dataset` can read), or a data set of the Hub.
    split, config: as `datasets.load_dataset` takes them ("train[:10%]" too) for folders and the Hub.
    keep_bad: lines that are no rows are kept as their errors, for `prepare` to skip.
    """
    if not dataset_name.strip():
        raise UserError("--dataset_name is empty: name a file, a folder or a data set of the Hub")
    path = Path(dataset_name)
    try:
        is_file, is_dir, exists = path.is_file(), path.is_dir(), path.exists()
    except OSError as error:
        raise UserError(f"{dataset_name} cannot be opened: {error.strerror}") from None
    if dataset_name == "arithmetic":
        rows = Rows("arithmetic", arithmetic_rows(kind, split, seed))
    elif is_file:
        if split != "train":
            raise UserError(
                f"{path} is a single file, which has the split 'train' only, not {split!r}: name another file"
            )
        rows = Rows(str(path), *read_file(path, keep_bad=keep_bad))
    elif is_dir:
        rows = _read_folder(path, split, config, keep_bad)
    elif exists:
        raise UserError(f"{path} is neither a file nor a folder")
    elif file_type(path.name) or dataset_name.startswith((".", "/", "~")):
        raise UserError(f"the data file {dataset_name} does not exist (looked in {Path.cwd()})")
    else:
        rows = Rows(f"{dataset_name} ({split})", _load(dataset_name, split, config))
    if not len(rows):
        raise UserError(f"{rows.name} has no rows")
    return rows


def _read_folder(path: Path, split: str, config: str | None, keep_bad: bool) -> Rows:
    named = [found for suffix in FILE_TYPES if (found := path / f"{split}{suffix}").is_file()]
    if config is None and named:
        if len(named) > 1:
            names = " and ".join(found.name for found in named)
            raise UserError(f"{path} holds {names}, each of which may be the split {split!r}: name the file itself")
        return Rows(str(named[0]), *read_file(named[0], keep_bad=keep_bad))
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return Rows(f"{path} ({split})", _load_from_disk(path, split))
    return Rows(f"{path} ({split})", _load(str(path), split, config))


def _load_from_disk(path: Path, split: str) -> Any:
    import datasets

    # The files are JSON and arrow, and whatever is wrong inside them is raised as it comes: ValueError, OSError,
    # AttributeError, ...
    try:
        stored = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"{path} cannot be read as what save_to_disk writes: {_said(error)}") from error
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
    # of exceptions, its own, pyarrow's, the Hub client's; each says in its first line what it missed.
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise UserError(
            f"the data set {name!r} (split {split!r}) cannot be loaded: {_said(error)}; expected 'arithmetic', "
            f"a file ({', '.join(FILE_TYPES)}), a folder, or a data set of the Hub that can be reached"
        ) from error


def _said(error: Exception) -> str:
    """What an exception of datasets says, and where it only says that there was one, what was behind it."""
    cause = error.__cause__
    return first_line(error) if cause is None else f"{first_line(error)}: {first_line(cause)}"
