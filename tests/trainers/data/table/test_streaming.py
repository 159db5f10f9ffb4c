"""Streamed rows: what is drawn, in which order, exactly where a run was left, and what is refused."""

import gzip
import json
from itertools import islice

import datasets
import pytest

from logratio.losses import Kind
from logratio.trainers.data.examples import Preparation, Rows, load_rows, prepare, prepare_prompts
from logratio.trainers.data.table import streaming
from logratio.trainers.data.table.load import load_data
from logratio.trainers.data.table.streaming import Stream
from logratio.trainers.errors import UserError
from logratio.trainers.loop import train_run
from logratio.trainers.options import parse_train
from logratio.trainers.policy.tiny import tiny_tokenizer
from logratio.trainers.setup import batches, build

TOKENIZER = tiny_tokenizer()
PAIRS = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "x" * (i % 5 + 1)} for i in range(30)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts of which there are several even in few rows."""
    monkeypatch.setattr(streaming, "LOOKED_AT", 5)
    monkeypatch.setattr(streaming, "TOGETHER", 4)


def stream(rows, kind=Kind.PAIRED, buffer=7, **options):
    rows = rows if isinstance(rows, Rows) else Rows("data", rows)
    options = {"max_length": 64, **options}
    return Stream(rows, lambda head: Preparation(head, kind, TOKENIZER, **options), buffer=buffer, epoch_size=99)


def taken(found, count, batch_size=6, **options):
    return list(islice(found.batches(batch_size, **{"shuffle": True, "seed": 1, **options}), count))


def rows_in(steps):
    return [example.row for items, _ in steps for example in items]


def test_every_epoch_has_each_row_once_and_the_same_examples():
    expected = prepare(Rows("data", PAIRS), Kind.PAIRED, TOKENIZER)[0]
    found = stream(PAIRS)
    steps = taken(found, 15)
    assert all(len(items) == 6 for items, _ in steps)
    order = rows_in(steps)
    assert [sorted(order[n : n + 30]) for n in (0, 30, 60)] == [list(range(30))] * 3
    assert len({tuple(order[n : n + 30]) for n in (0, 30, 60)}) == 3
    assert all(example == expected[example.row] for items, _ in steps for example in items)
    assert rows_in(taken(found, 10, shuffle=False)) == [*range(30)] * 2
    assert list(found) == expected[:5] and len(found) == 5


def test_a_row_is_drawn_once_the_buffer_has_it_and_the_order_is_the_seeds_alone():
    order = rows_in(taken(stream(PAIRS), 5))
    assert all(row <= place + 7 for place, row in enumerate(order))
    assert any(row < place - 7 for place, row in enumerate(order)) or order != sorted(order)
    assert rows_in(taken(stream(PAIRS), 5)) == order != rows_in(taken(stream(PAIRS), 5, seed=2))
    assert order != rows_in(taken(stream(PAIRS, buffer=8), 5))
    whole = rows_in(taken(stream(PAIRS, buffer=100), 5))
    assert sorted(whole) == list(range(30)) and sum(a > b for a, b in zip(whole, whole[1:], strict=False)) > 5


@pytest.mark.parametrize("kind", [Kind.PAIRED, Kind.LABELED])
@pytest.mark.parametrize("batch_size", [1, 5, 7])
def test_a_stream_goes_on_exactly_where_it_was_left(kind, batch_size, monkeypatch):
    """Rows that become one example, two or, too long, none; batches that end within a row, and over the end of an
    epoch."""
    rows = [{**row, "prompt": "p" * 70} if i % 6 == 1 else row for i, row in enumerate(PAIRS)]
    whole = taken(stream(rows, kind), 24, batch_size)
    if kind is Kind.LABELED and batch_size == 5:
        assert any(position["made"] == 1 and len(items) % 2 for items, position in whole), "within a row"
    for number, (_, position) in enumerate(whole[:-1]):
        start = json.loads(json.dumps(position))
        assert taken(stream(rows, kind), 23 - number, batch_size, start=start) == whole[number + 1 :]


def test_rows_before_the_place_are_read_and_not_tokenized(monkeypatch):
    whole = taken(stream(PAIRS), 4)
    again, tokenized, made = stream(PAIRS), [], Preparation.made

    def counted(self):
        tokenized.append(len(self.rows))
        return made(self)

    monkeypatch.setattr(Preparation, "made", counted)
    assert taken(again, 1, start=whole[2][1]) == whole[3:]
    assert sum(tokenized) <= 6 + 2 * streaming.TOGETHER


def test_all_sources_are_streamed_alike(tmp_path, monkeypatch):
    rows = [{"prompt": f"question {i}", "answer": i} for i in range(20)]
    text = "\n\n".join(map(json.dumps, rows))
    (tmp_path / "q.jsonl").write_text(text)
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "q.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "q.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "part.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = prepare_prompts(Rows("", rows), TOKENIZER)[0]

    def known(self):
        raise AssertionError("the file was looked through")

    monkeypatch.setattr("logratio.trainers.data.files.LineRows._known", property(known))
    for name in ("q.jsonl", "q.jsonl.gz", "q.json", "q.parquet", "saved", "folder"):
        found = stream(load_rows(str(tmp_path / name), Kind.GROUPED, check=False, streaming=True), Kind.GROUPED)
        assert [p for items, _ in taken(found, 2, 10, shuffle=False) for p in items] == expected, name


def test_a_bad_row_is_named_as_it_stands_in_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"

    def error(lines):
        path.write_text("\n".join(lines))
        found = stream(load_rows(str(path), Kind.PAIRED, check=False, streaming=True))
        with pytest.raises(UserError) as caught:
            taken(found, 9)
        return str(caught.value).removeprefix(str(path))

    lines = [json.dumps(row) for row in PAIRS]
    assert error([*lines[:20], "", '{"prompt": "q"}', *lines[20:]]).startswith(", line 22 lacks 'chosen'")
    assert error([*lines[:20], "", "{", *lines[20:]]).startswith(", line 22, column 2 is not valid JSON")
    with pytest.raises(UserError, match=r"^data, row 21 \(counted from 0\) lacks 'chosen'"):
        taken(stream([*PAIRS[:21], {"prompt": "q"}]), 9)
    path.write_text("")
    with pytest.raises(UserError, match="rows.jsonl has no rows$"):
        stream(load_rows(str(path), Kind.PAIRED, check=False, streaming=True))


# --- a run


def config_of(tmp_path, method, *options, rows=PAIRS):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out"), "--streaming"]
    return parse_train([method, *words, *options])


def test_a_run_streams_over_epochs_and_says_what_became_of_the_rows(tmp_path, capsys):
    rows = [{**row, "rejected": "x" * 2000} if i == 17 else row for i, row in enumerate(PAIRS)]
    run = build(config_of(tmp_path, "dpo", "--max_steps", "5", "--streaming_buffer", "3", "--lora_r", "2", rows=rows))
    assert run.total_steps == 5 and run.data.epoch_size == 40
    assert next(batches(run.data.train, 8, shuffle=True, seed=42)) == taken(run.data.train, 1, 8, seed=42)[0]
    assert train_run(run)["step"] == 5
    said = capsys.readouterr().out
    assert "rows.jsonl: " in said and "1 completion truncated by" in said and "streamed " in said


def test_prompts_are_streamed_with_their_columns(tmp_path):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(9)]
    options = ("--max_steps", "2", "--batch_size", "4", "--num_generations", "2", "--max_completion_length", "2")
    assert train_run(build(config_of(tmp_path, "grpo", *options, rows=rows)), quiet=True)["step"] == 2


def test_what_was_not_looked_at_before_is_checked_when_it_comes(tmp_path):
    from logratio.trainers.policy.tiny import tiny_model

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zzzz"])
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{**row, "rejected": "zzzz"} if i == 17 else row for i, row in enumerate(PAIRS)]
    options = ("--max_steps", "9", "--lora_r", "2", "--model_name_or_path", str(tmp_path / "model"))
    run = build(config_of(tmp_path, "dpo", *options, rows=rows))
    with pytest.raises(UserError, match="row 17 of the data set holds token 259, which has no row in the embeddings"):
        train_run(run, quiet=True)


def test_a_fingerprint_is_of_the_beginning_and_the_options(tmp_path):
    def found(*options, rows=PAIRS):
        config = config_of(tmp_path, "dpo", "--max_steps", "2", *options, rows=rows)
        return load_data(config.resolved(1), TOKENIZER).fingerprint

    others = [found("--streaming_buffer", "9"), found("--max_length", "60"), found(rows=PAIRS[1:])]
    assert len({found(), *others}) == 4 and found() == found()


REFUSED = {
    (): "the end of an epoch is not known; say --max_steps",
    ("--max_steps", "1", "--eval_size", "1"): "--eval_size takes rows out of all; name a --dataset_test_split",
    ("--max_steps", "1", "--on_bad_row", "skip"): "--on_bad_row skip lists rows before training; mend or remove them",
    ("--max_steps", "1", "--dataset_weights", "1"): "--dataset_weights and several data sets are drawn from by index;",
    (
        "--max_steps",
        "1",
        "--dataset_name",
        "a",
        "b",
    ): "--dataset_weights and several data sets are drawn from by index;",
    ("--max_steps", "1", "--dataset_num_proc", "2"): "--dataset_num_proc deals them out; leave it at 1",
    ("--max_steps", "1", "--precompute_ref_log_probs"): "--precompute_ref_log_probs keeps something of each row; leave",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_needs_all_rows_beforehand_is_refused(tmp_path, options):
    with pytest.raises(UserError) as caught:
        load_data(config_of(tmp_path, "dpo", *options).resolved(1), TOKENIZER)
    assert str(caught.value).startswith(f"--streaming does not know the rows before they come: {REFUSED[options]}")


def test_processes_may_tokenize_what_a_streamed_run_is_evaluated_on(tmp_path):
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        (tmp_path / "rows" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:4]))
    words = ["--dataset_name", str(tmp_path / "rows"), "--dataset_test_split", "test", "--dataset_num_proc", "2"]
    config = config_of(tmp_path, "dpo", *words, "--max_steps", "1").resolved(1)
    assert len(load_data(config, TOKENIZER).evaluation) == 4


def test_a_buffer_that_nothing_is_streamed_through_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    config = parse_train(["dpo", "--dataset_name", str(tmp_path / "rows.jsonl"), "--streaming_buffer", "5"])
    with pytest.raises(UserError, match="^--streaming_buffer is of rows that are streamed: add --streaming, or leave"):
        load_data(config.resolved(1), TOKENIZER)
