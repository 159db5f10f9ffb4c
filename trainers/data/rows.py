"""Where rows come from: the embedded task, a local file or folder, or the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logratio.losses import Kind

from ..errors import RowError, UserError, first_line
from ..ground.given import given
from .files import FILE_TYPES, file_type, open_file
from .own_rows import OwnRows, digest_of
from .tasks.arithmetic import arithmetic_rows
from .tasks.shopping import shopping_rows

EMBEDDED = {"arithmetic": arithmetic_rows, "shopping": shopping_rows}
"""The tasks that need no file."""
LEARNED = ("prompt", "completion", "messages", "conversations", "text")
"""Columns of which a row that is learned whole has one or two."""


@dataclass(frozen=True)
class Rows:
    """A data set's rows and the name that messages call it by.

    rows: each a mapping from columns to values; in place of one that could not be read, its RowError.
    lines: each row's line number in a JSON-lines file. numbers: which rows of the data set these are; None: all.
    columns: the only ones that count, where not all do. text: the one that is taken for `text`, and alone to learn.
    """

    name: str
    rows: Any
    lines: Sequence[int] | None = None
    columns: tuple[str, ...] | None = None
    text: str = "text"
    numbers: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return (row for _, row in self.between())

    def between(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any]]:
        """The rows from `start` to `stop`, numbered from `start`."""
        rows, index = self._from(start), start
        while stop is None or index < stop:
            try:
                row = next(rows)
            except StopIteration:
                return
            except UserError:  # knows its place
                raise
            except Exception as error:  # datasets reads and decodes (images, audio) only here
                raise UserError(f"{self.where(index)} cannot be read: {_said(error)}") from error
            yield index, self._cut(row, index)
            index += 1

    def numbered(self) -> Iterator[tuple[int | None, Any]]:
        """The rows with the numbers of their lines, if they have such; nothing is looked through before."""
        if hasattr(self.rows, "numbered"):
            return ((number, self._cut(row, index)) for index, (number, row) in enumerate(self.rows.numbered()))
        return ((None, row) for row in self)

    def _cut(self, row: Any, index: int) -> Any:
        if isinstance(row, RowError):
            return row
        if self.columns is not None:
            row = {column: row[column] for column in self.columns if column in row}
        if self.text == "text":
            return row
        if self.text not in row:
            said = f" has no column {self.text!r} (--dataset_text_field), it has {', '.join(row) or '(none)'}"
            return RowError(self.where(index), said, index)
        return {column: row[column] for column in row if column not in (*LEARNED, self.text)} | {"text": row[self.text]}

    def _from(self, start: int) -> Iterator[Any]:
        if hasattr(self.rows, "starting"):
            return iter(self.rows.starting(start))
        if start == 0:
            return iter(self.rows)
        if hasattr(self.rows, "select"):  # datasets', which reads many rows at a time only where it is iterated over
            return iter(self.rows.select(range(start, len(self.rows))))
        return map(self.rows.__getitem__, range(start, len(self.rows)))

    def check(self) -> Rows:
        """These rows, all of which have been read once: UserError for what cannot be."""
        for row in self:
            if isinstance(row, RowError):
                raise row
        return self

    def check_unchanged(self) -> None:
        """Raise UserError where the file is not what it was when these rows were found in it."""
        if hasattr(self.rows, "check_unchanged"):
            self.rows.check_unchanged()

    def digest(self) -> str:
        """SHA-256 of what the rows say, wherever they lie."""
        found = getattr(self.rows, "digest", None) or _digest(self.name, self.rows)
        for what in (self.columns, None if self.text == "text" else self.text):
            found = found if what is None else hashlib.sha256(f"{found} {what}".encode()).hexdigest()
        return found

    def where(self, row: int) -> str:
        """The row's place, as an error's sentence begins with it."""
        if self.lines:
            return f"{self.name}, line {self.lines[row]}"
        return f"{self.name}, row {self.numbers[row] if self.numbers else row} (counted from 0)"


def _digest(name: str, rows: Any) -> str:
    if not hasattr(rows, "data") or rows.format["type"] == "custom":  # of a transform what it makes is known alone
        return digest_of(name, rows)
    found = hashlib.sha256()
    import pyarrow

    # datasets' own fingerprint says where rows came from, not what they are
    found.update(f"{rows.features} {rows.format}".encode())
    for table in (rows.data.table, rows._indices and rows._indices.table):
        for batch in () if table is None else table.to_batches(max_chunksize=1000):
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(batch)
            found.update(sink.getvalue())
    return found.hexdigest()


def load_rows(
    dataset_name: str,
    kind: Kind,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    seed: int = 0,
    check: bool = True,
    streaming: bool = False,
) -> Rows:
    """The rows of one split of `dataset_name`; never empty, unless they are streamed.

    dataset_name: one of `EMBEDDED` (in the columns of `kind`; `seed` draws what is random in it), a local
        file of one of `FILE_TYPES` (its one split is "train"), a folder (`{split}.jsonl` and its like, what
        `Dataset.save_to_disk` wrote, or whatever `datasets.load_dataset` can read), or a data set of the Hub.
    split, config: as `datasets.load_dataset` takes them ("train[:10%]" too) for folders and the Hub.
    revision: a branch, a tag or a commit of the Hub's; None: its main branch.
    check: read a file's rows once, to raise here what cannot be read; else what is no row is among them as its error,
        for `prepare` to raise or to skip, and all else is raised where they are iterated over.
    streaming: nothing is read before the rows are iterated over, and how many there are is not known.
    """
    if not dataset_name.strip():
        raise UserError("--dataset_name is empty: name a file, a folder or a data set of the Hub")
    if (own := given(dataset_name)) is not None:
        rows, name = own[split], f"{dataset_name} ({split})"
        rows = Rows(name, rows if hasattr(rows, "_indices") else OwnRows(name, rows))  # of datasets, or a list
        if not len(rows):
            raise UserError(f"{rows.name} has no rows")
        return rows
    path = Path(dataset_name)
    try:
        is_file, is_dir, exists = path.is_file(), path.is_dir(), path.exists()
    except OSError as error:
        raise UserError(f"{dataset_name} cannot be opened: {error.strerror}") from None
    if config is not None and (dataset_name in EMBEDDED or is_file or is_saved(path)):
        raise UserError(f"--dataset_config {config}: {dataset_name} has no configurations; leave it out")
    if revision is not None and (dataset_name in EMBEDDED or exists):
        raise UserError(
            f"--dataset_revision {revision} is of a data set on the Hub, which {dataset_name} is not; leave it out"
        )
    if dataset_name in EMBEDDED:
        rows = Rows(dataset_name, EMBEDDED[dataset_name](kind, split, seed))
    elif is_file:
        if split != "train":
            raise UserError(
                f"{path} is a single file, which has the split 'train' only, not {split!r}: name another file"
            )
        rows = _file_rows(path, check, streaming)
    elif is_dir:
        rows = _read_folder(path, split, config, check, streaming)
    elif exists:
        raise UserError(f"{path} is neither a file nor a folder")
    elif file_type(path.name) or dataset_name.startswith((".", "/", "~")):
        raise UserError(f"the data file {dataset_name} does not exist (looked in {Path.cwd()})")
    else:
        rows = Rows(f"{dataset_name} ({split})", _load(dataset_name, split, config, streaming, revision))
    if not streaming and not len(rows):
        raise UserError(f"{rows.name} has no rows")
    return rows


def _read_folder(path: Path, split: str, config: str | None, check: bool, streaming: bool) -> Rows:
    named = [found for suffix in FILE_TYPES if (found := path / f"{split}{suffix}").is_file()]
    if config is None and named:
        if len(named) > 1:
            names = " and ".join(found.name for found in named)
            raise UserError(f"{path} holds {names}, each of which may be the split {split!r}: name the file itself")
        return _file_rows(named[0], check, streaming)
    if is_saved(path):
        return Rows(f"{path} ({split})", _load_from_disk(path, split))
    return Rows(f"{path} ({split})", _load(str(path), split, config, streaming))


def _file_rows(path: Path, check: bool, streaming: bool) -> Rows:
    found = open_file(path)
    rows = Rows(str(path), found, None if streaming else getattr(found, "lines", None))
    return rows.check() if check and not streaming else rows


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


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


def _load(name: str, split: str, config: str | None, streaming: bool, revision: str | None = None) -> Any:
    import datasets

    at = "" if revision is None else f", revision {revision}"
    # datasets reports what is wrong with a name, a split, a configuration, a file or the network by as many types
    # of exceptions, its own, pyarrow's, the Hub client's; each says in its first line what it missed.
    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming, revision=revision)
    except Exception as error:
        raise UserError(
            f"the data set {name!r} (split {split!r}{at}) cannot be loaded: {_said(error)}; expected 'arithmetic', "
            f"'shopping', a file ({', '.join(FILE_TYPES)}), a folder, or a data set of the Hub that can be reached"
        ) from error


def _said(error: Exception) -> str:
    """What an exception of datasets says, and where it only says that there was one, what was behind it."""
    cause = error.__cause__
    return first_line(error) if cause is None else f"{first_line(error)}: {first_line(cause)}"
