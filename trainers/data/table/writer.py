"""Examples into an Arrow file: a row of the table each, all token ids of an example in one list.

    ids      of the prompt and its completions, one behind the other
    lengths  of the prompt, then of each completion; of a `Prompt` only its own
    row      in the data set
    label    1, 0, or -1 for None
    margin   of a pair, NaN for None
    scored, weights   of the only completion, null where it has none
    rewards  of the completions of a list, null else
    rest     of a `Prompt`, null else: JSON of its text or messages, and its columns (`values.py`)

Behind the Arrow file stands what is known of all its rows, as JSON (`close`), and an `END`, by whose hash a damaged
file is found out before anything in it is believed: Arrow does not check what it maps.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import struct
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ...errors import UserError
from ..types import Completion, Example, Prompt
from .extremes import Extremes
from .values import to_json

SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "lengths": pa.list_(pa.int32()),
        "row": pa.int64(),
        "label": pa.int8(),
        "margin": pa.float64(),
        "scored": pa.list_(pa.uint8()),
        "weights": pa.list_(pa.float64()),
        "rewards": pa.list_(pa.float64()),
        "rest": pa.list_(pa.uint8()),
    }
)
END = struct.Struct("<8sQ32s")
"""MARK, bytes of the Arrow file, SHA-256 of all that is before the hash itself."""
MARK = b"logratio"
# What a record batch holds at most, and what is in memory while one is written.
BATCH_ROWS = 2048
BATCH_TOKENS = 1 << 20


class Digest:
    """SHA-256 of what a table holds, however it is cut into record batches."""

    def __init__(self) -> None:
        self._parts = {name: (hashlib.sha256(), hashlib.sha256()) for name in SCHEMA.names}

    def update(self, batch: pa.RecordBatch) -> None:
        for name, (counts, values) in self._parts.items():
            column = batch.column(name)
            if pa.types.is_list(column.type):
                lengths = pa.compute.list_value_length(column).fill_null(-1)
                counts.update(np.ascontiguousarray(lengths.to_numpy()).data)
                column = column.values
            values.update(np.ascontiguousarray(column.to_numpy()).data)

    def hexdigest(self) -> str:
        parts = [part.hexdigest() for pair in self._parts.values() for part in pair]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


class TableWriter:
    """A table that is being written to `path`. Raises OSError where the disk does not take it."""

    def __init__(self, path: Path) -> None:
        self.path, self.written = path, list[int]()
        self.digest, self.extremes = Digest(), Extremes()
        self._sink = pa.OSFile(str(path), "wb")
        self._file = pa.ipc.new_file(self._sink, SCHEMA)
        self._rows: list[dict[str, Any]] = []
        self._tokens = 0

    def add(self, made: Example | Prompt) -> None:
        """Raises UserError for a prompt whose columns hold what no file can."""
        completions = made.completions if isinstance(made, Example) else []
        masked = completions[0] if len(completions) == 1 else Completion([])
        if any(c is not masked and (c.scored is not None or c.weights is not None) for c in completions):
            raise ValueError("only a completion that stands alone may have a mask or weights")
        ids = list(chain(made.prompt_ids, *(c.ids for c in completions)))
        row: dict[str, Any] = {
            "ids": ids,
            "lengths": [len(made.prompt_ids), *(len(c.ids) for c in completions)],
            "row": made.row,
            "label": -1,
            "margin": math.nan,
            "scored": None if masked.scored is None else list(map(int, masked.scored)),
            "weights": masked.weights,
        }
        if isinstance(made, Prompt):
            row["rest"] = _rest(made)
        else:
            row["rewards"] = made.rewards
            row["label"] = -1 if made.label is None else int(made.label)
            row["margin"] = math.nan if made.margin is None else made.margin
        self._rows.append(row)
        self._tokens += len(ids)
        if len(self._rows) >= BATCH_ROWS or self._tokens >= BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self.append(pa.RecordBatch.from_pylist(self._rows, schema=SCHEMA))
            self._rows, self._tokens = [], 0

    def append(self, batch: pa.RecordBatch) -> None:
        """Rows that another table has."""
        self._file.write_batch(batch)
        self.digest.update(batch)
        self.extremes |= _extremes(batch)
        self.written.append(batch.num_rows)

    def append_table(self, path: Path) -> None:
        """All rows of a closed table, behind those that were added here."""
        self._flush()
        with pa.OSFile(str(path), "rb") as source:
            reader = pa.ipc.open_file(source)
            for i in range(reader.num_record_batches):
                self.append(reader.get_batch(i))

    def close(self, about: dict[str, Any] | None = None) -> None:
        """End the file. about: further things to say of its rows, beside how many each record batch has, their digest
        and their extremes; None: a part of a table, of which nothing is said."""
        self._flush()
        self._file.close()
        self._sink.close()
        if about is None:
            return
        extremes = [self.extremes.token, self.extremes.sequence, self.extremes.prompt, self.extremes.completion]
        said = {**about, "batches": self.written, "digest": self.digest.hexdigest(), "extremes": extremes}
        with self.path.open("r+b") as file:
            found = hashlib.file_digest(file, "sha256")
            size = file.tell()
            text = json.dumps(said).encode()
            found.update(text + END.pack(MARK, size, b"")[: -found.digest_size])
            file.write(text + END.pack(MARK, size, found.digest()))

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._sink.closed:  # it was not ended, and is of no use
            with contextlib.suppress(OSError):
                self._sink.close()
            self.path.unlink(missing_ok=True)


def _rest(prompt: Prompt) -> bytes:
    try:
        return to_json([prompt.prompt, prompt.columns]).encode()
    except (TypeError, RecursionError) as error:
        what = "values nested too deeply" if isinstance(error, RecursionError) else f"a value of type {error}"
        raise UserError(
            f"row {prompt.row} of the data set (counted from 0) has {what} in its columns, which cannot be kept for "
            "rewards: turn it into text, numbers, lists or objects, or remove the column"
        ) from None


def _extremes(batch: pa.RecordBatch) -> Extremes:
    rows = batch.column("row").to_numpy()
    ids, lengths = batch.column("ids"), batch.column("lengths")
    starts, values = lengths.offsets.to_numpy()[:-1], lengths.values.to_numpy()
    prompts = values[starts]
    others = values.copy()
    others[starts] = 0
    longest = np.maximum.reduceat(others, starts)

    def most(of: Any) -> tuple[int, int]:
        at = int(of.argmax())
        return int(of[at]), int(rows[at])

    tokens = ids.values.to_numpy()
    at = int(tokens.argmax())
    has_it = int(np.searchsorted(ids.offsets.to_numpy(), at, side="right")) - 1
    largest = (int(tokens[at]), int(rows[has_it]))
    return Extremes(largest, most(prompts + longest), most(prompts), int(longest.max()))
