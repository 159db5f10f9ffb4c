"""The suite `data`: rows to tokens, tokens to micro-batches, and what memory a process takes for it.

A case is a file of preference rows, generated, and one process of its own that does what a training process does with
it: it tokenizes the rows (or finds them in the cache), maps the table, and goes through an epoch in its shuffled order,
building each example by its index. The memory is its resident memory at the worst moment: `peak_rss_mib` of the whole
process, libraries in it and no model, and `beyond_imports_mib` of it what came on top of the libraries.

Tokens are those of the embedded tokenizer, one a byte, so that a row of 500 tokens has 500 characters; another
tokenizer's rows would be longer texts. A case without texts begins with a table of random ids: what reading takes of
more rows than one would wait for to be tokenized.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from logratio.trainers.data.table.stored import Examples, Table
from logratio.trainers.data.table.writer import BATCH_ROWS, SCHEMA, TableWriter

TABLE = ".table"
WORDS = "a and as at by for from have it not of on that the they this to was what with you".split()
CONTESTANTS = ("logratio",)
BATCH_SIZE, MICRO_BATCH_TOKENS = 32, 8192


@dataclass(frozen=True)
class DataCase:
    """Preference rows of about `row_tokens` tokens, all three texts together. texts: or a table of ids already.
    packed: how many examples are."""

    rows: int
    row_tokens: int = 500
    processes: int = 1
    texts: bool = True
    packed: int = 20_000

    @property
    def case(self) -> str:
        how = f"{self.processes}proc" if self.texts else "table"
        return f"data-pairs-{self.rows}x{self.row_tokens}-{how}"

    def fields(self) -> dict[str, Any]:
        return {"rows": self.rows, "row_tokens": self.row_tokens, "processes": self.processes, "texts": self.texts}


def run(case: DataCase, *, seed: int) -> dict[str, dict[str, Any]]:
    """{contestant: status and figures}."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("pairs.jsonl" if case.texts else f"pairs{TABLE}")
        (write_rows if case.texts else write_table)(path, case, seed)
        words = [str(path), str(case.processes), str(case.packed), str(seed)]
        figures: dict[str, Any] = {"status": "ok", "file_mib": path.stat().st_size / 2**20}
        for name in ("", "again_") if case.texts else ("",):  # the second process finds the table
            figures |= {f"{name}{key}": value for key, value in in_a_process(words, Path(folder)).items()}
    return {CONTESTANTS[0]: figures}


def write_rows(path: Path, case: DataCase, seed: int) -> None:
    """Prompts of two fifths of a row, and two completions, of words; lengths vary by half of themselves each way."""
    rng = random.Random(seed)
    book = " ".join(rng.choices(WORDS, k=20 * case.row_tokens + 50_000))  # pieces of which are drawn faster than words

    def text(tokens: float) -> str:
        length = round(tokens * rng.uniform(0.5, 1.5))
        start = rng.randrange(len(book) - length)
        return book[start : start + length].strip() or "a"

    part = case.row_tokens / 5
    with path.open("w") as file:
        for number in range(case.rows):
            row = {"prompt": f"{number} {text(2 * part)}", "chosen": text(1.5 * part), "rejected": text(1.5 * part)}
            file.write(json.dumps(row) + "\n")


def write_table(path: Path, case: DataCase, seed: int) -> None:
    """As the table of such rows, of random ids."""
    rng = np.random.default_rng(seed)
    parts = np.array([2, 1.5, 1.5]) * case.row_tokens / 5
    with TableWriter(path) as table:
        for start in range(0, case.rows, BATCH_ROWS):
            rows = min(BATCH_ROWS, case.rows - start)
            lengths = np.rint(parts * rng.uniform(0.5, 1.5, (rows, 3))).astype(np.int32)
            cuts = np.concatenate([[0], lengths.sum(1).cumsum()]).astype(np.int32)
            ids = rng.integers(0, 256, cuts[-1], dtype=np.int32)
            columns = {
                "ids": pa.ListArray.from_arrays(pa.array(cuts), pa.array(ids)),
                "lengths": pa.ListArray.from_arrays(
                    pa.array(np.arange(0, 3 * rows + 1, 3, dtype=np.int32)), pa.array(lengths.ravel())
                ),
                "row": pa.array(np.arange(start, start + rows)),
                "label": pa.array(np.full(rows, -1, np.int8)),
                "margin": pa.array(np.full(rows, np.nan)),
            }
            absent = {f.name: pa.nulls(rows, f.type) for f in SCHEMA if f.name not in columns}
            table.append(pa.record_batch([{**columns, **absent}[f.name] for f in SCHEMA], schema=SCHEMA))
        table.close({"rows": case.rows})


def in_a_process(words: Sequence[str], cache: Path) -> dict[str, Any]:
    """What `measured` finds in a process that has done nothing else."""
    code = f"import sys, json; from {__name__} import measured; print(json.dumps(measured(*sys.argv[1:])))"
    env = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["a process was killed"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(path: str, processes: str, packed: str, seed: str) -> dict[str, Any]:
    """Figures of one process; ms are wall-clock."""
    import torch

    from logratio.trainers.batches.packing import pack
    from logratio.trainers.data.table.load import load_data
    from logratio.trainers.logs.runlog import peak_mem_mib, reset_peak_mem
    from logratio.trainers.options import parse_train
    from logratio.trainers.policy.tiny import tiny_tokenizer
    from logratio.trainers.setup import (
        batches,
        build,  # noqa: F401  # the libraries that training imports
    )

    cpu, words = torch.device("cpu"), ["dpo", "--dataset_name", path, "--dataset_num_proc", processes]
    tokenizer = tiny_tokenizer()
    reset_peak_mem(cpu)
    imports_mib = peak_mem_mib(cpu)
    started = time.perf_counter()
    if path.endswith(TABLE):
        train: Any = Examples([Table(Path(path))], [path])
    else:
        train = load_data(parse_train([*words, "--seed", seed]), tokenizer).train
    load_s = time.perf_counter() - started
    examples = len(train)
    loaded_mib = peak_mem_mib(cpu)

    steps = min(int(packed), examples) // BATCH_SIZE or 1
    started = time.perf_counter()
    for items, _ in islice(batches(train, BATCH_SIZE, shuffle=True, seed=int(seed)), steps):
        pack(items, MICRO_BATCH_TOKENS)
    packed_s = time.perf_counter() - started
    started, tokens = time.perf_counter(), 0
    for items, _ in islice(batches(train, BATCH_SIZE, shuffle=True, seed=int(seed)), -(-examples // BATCH_SIZE)):
        tokens += sum(len(e.prompt_ids) + sum(len(c.ids) for c in e.completions) for e in items)
    read_s = time.perf_counter() - started
    peak = peak_mem_mib(cpu)
    return {
        "tokens": tokens,
        "load_s": load_s,
        "rows_per_s": None if path.endswith(TABLE) else examples / load_s,
        "packed_examples_per_s": min(steps * BATCH_SIZE, examples) / packed_s,
        "read_examples_per_s": examples / read_s,
        "table_mib": sum(table.size for table in train.tables) / 2**20,
        "imports_mib": imports_mib,
        "load_rss_mib": loaded_mib,
        "peak_rss_mib": peak,
        "beyond_imports_mib": peak - imports_mib,
    }
