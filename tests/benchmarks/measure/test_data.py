"""The suite `data`: rows of the size that it names, and figures of a process that did what training does."""

import json
import statistics

import pytest

from logratio.benchmarks import bench
from logratio.benchmarks.measure.data import DataCase, measured, write_rows, write_table
from logratio.benchmarks.reporting.records import read
from logratio.trainers.data.table.extremes import extremes_of
from logratio.trainers.data.table.stored import Examples, Table, is_whole
from logratio.trainers.policy.tiny import tiny_tokenizer


def test_rows_have_as_many_tokens_as_the_case_says(tmp_path):
    write_rows(tmp_path / "rows.jsonl", DataCase(400), 0)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    lengths = [sum(len(text) for text in row.values()) for row in rows]
    assert len(rows) == 400 and statistics.mean(lengths) == pytest.approx(500, rel=0.05)
    assert max(lengths) > 600 > 400 > min(lengths) and len({row["prompt"] for row in rows}) == 400
    write_rows(tmp_path / "again.jsonl", DataCase(400), 0)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "rows.jsonl").read_bytes()


@pytest.mark.slow
def test_a_case_leaves_a_line(tmp_path):
    assert bench.main(["data", "--data_rows", "70", "--data_processes", "2", "--results", str(tmp_path)]) == 0
    (row,) = read(tmp_path / "cpu.jsonl")
    assert (row["suite"], row["case"], row["status"]) == ("data", "data-pairs-70x500-2proc", "ok")
    assert row["tokens"] == row["again_tokens"] and row["table_mib"] == row["again_table_mib"] > 0
    for name in ("", "again_"):
        assert 0 < row[f"{name}imports_mib"] <= row[f"{name}load_rss_mib"] <= row[f"{name}peak_rss_mib"]
        assert all(row[f"{name}{figure}_per_s"] > 0 for figure in ("rows", "packed_examples", "read_examples"))


def test_every_row_is_read_once(tmp_path):
    write_rows(tmp_path / "rows.jsonl", DataCase(45), 3)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    tokenizer = tiny_tokenizer()
    ends = {"prompt": 0, "chosen": 1, "rejected": 1}  # EOS
    expected = sum(len(tokenizer(row[c])["input_ids"]) + more for row in rows for c, more in ends.items())
    assert measured(str(tmp_path / "rows.jsonl"), "1", "20", "0")["tokens"] == expected


def test_a_table_of_ids_has_rows_of_the_same_sizes(tmp_path):
    write_table(tmp_path / "pairs.table", DataCase(3000, texts=False), 0)
    assert is_whole(tmp_path / "pairs.table")
    examples = Examples([Table(tmp_path / "pairs.table")], ["pairs"])
    lengths = [(len(e.prompt_ids), *(len(c.ids) for c in e.completions)) for e in examples]
    assert [e.row for e in examples] == list(range(3000)) and {e.label for e in examples} == {None}
    assert [statistics.mean(part) for part in zip(*lengths, strict=True)] == pytest.approx([200, 150, 150], rel=0.05)
    assert extremes_of(list(examples)) == examples.extremes
