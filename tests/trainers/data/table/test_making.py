"""Tables are made once, found again by what they come from, and the same however many processes made them."""

import datetime
import errno
import itertools
import json
import os
import signal
import time

import datasets
import pytest

from logratio.losses import Kind
from logratio.trainers.data.examples import Preparation, Rows, load_rows, prepare, prepare_prompts
from logratio.trainers.data.table import cache, making, workers
from logratio.trainers.data.table.stored import Examples, Table
from logratio.trainers.data.table.writer import TableWriter
from logratio.trainers.errors import RowError, UserError
from logratio.trainers.policy.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
OPTIONS = {"max_length": 64, "on_bad_row": "error"}
PAIRS = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "x" * (i % 5 + 1)} for i in range(40)]


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """The folder of the tables."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "logratio"


def made(rows, kind=Kind.PAIRED, tokenizer=TOKENIZER, **options):
    rows = rows if isinstance(rows, Rows) else Rows("data", rows)
    path, report = making.make_table(rows, kind, tokenizer, **{**OPTIONS, **options})
    return list(Examples([Table(path)], [rows.name])), report, path


def untouched(monkeypatch):
    def never(*args):
        raise AssertionError("rows were tokenized again")

    monkeypatch.setattr(Preparation, "made", never)


def bad_lines(tmp_path, name="rows.jsonl"):
    lines = [json.dumps(row) for row in PAIRS]
    lines[3], lines[17] = '{"prompt"', json.dumps({**PAIRS[17], "chosen": ""})
    (tmp_path / name).write_text("\n\n".join(lines))
    return load_rows(str(tmp_path / name), Kind.PAIRED, check=False)


def test_a_table_is_found_again_with_all_that_was_said_of_its_rows(tmp_path, monkeypatch):
    rows = bad_lines(tmp_path)
    examples, report, path = made(rows, on_bad_row="skip")
    expected, said = prepare(rows, Kind.PAIRED, TOKENIZER, on_bad_row="skip", max_length=64)
    assert examples == expected and str(report) == str(said) and report.skipped == said.skipped
    untouched(monkeypatch)
    again, found, where = made(bad_lines(tmp_path), on_bad_row="skip")
    assert (again, str(found), found.skipped, where) == (examples, str(said), said.skipped, path)
    assert [entry["line"] for entry in found.skipped] == [7, 35]
    moved = bad_lines(tmp_path, "moved.jsonl")
    _, found, where = made(moved, on_bad_row="skip")
    assert where == path and str(found).startswith(f"{tmp_path}/moved.jsonl: 38 examples; 2 rows skipped (")
    assert {entry["data"] for entry in found.skipped} == {moved.name}


def other_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += " "
    return tokenizer


def other_token():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["xxxxx"])
    return tokenizer


def other_pad():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_all_that_decides_on_the_result_decides_on_the_table(monkeypatch, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS[::-1]))
    both = [load_rows(str(tmp_path / name), Kind.PAIRED) for name in ("a.jsonl", "b.jsonl")]
    a, b = both
    keys = [
        cache.key(a, TOKENIZER, OPTIONS),
        cache.key(b, TOKENIZER, OPTIONS),
        cache.key(Rows(a.name, a.rows, columns=("prompt",)), TOKENIZER, OPTIONS),
        cache.key(a, TOKENIZER, {**OPTIONS, "max_length": 63}),
        cache.key(a, TOKENIZER, {**OPTIONS, "on_bad_row": "skip"}),
        cache.key(a, TOKENIZER, {**OPTIONS, "completion_only_loss": None}),
        cache.key(a, TOKENIZER, {**OPTIONS, "completion_only_loss": False}),
        *(cache.key(a, other, OPTIONS) for other in (other_template(), other_token(), other_pad())),
    ]
    assert len(set(keys)) == len(keys)
    tokenizer = tiny_tokenizer()
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert cache.key(load_rows(str(tmp_path / "a.jsonl"), Kind.PAIRED), tokenizer, OPTIONS) == keys[0]
    monkeypatch.setattr(cache.transformers, "__version__", "0")
    assert cache.key(a, TOKENIZER, OPTIONS) != keys[0]


def test_a_template_that_writes_the_date_makes_another_table_every_day(monkeypatch):
    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date(2099, 1, 1)

    dated = tiny_tokenizer()
    dated.chat_template = "{{ strftime_now('%Y') }}" + dated.chat_template
    today = [cache.tokenizer_digest(t) for t in (dated, TOKENIZER)]
    monkeypatch.setattr(cache.datetime, "date", Tomorrow)
    assert [cache.tokenizer_digest(t) == d for t, d in zip((dated, TOKENIZER), today, strict=True)] == [False, True]


def test_what_rows_say_is_known_of_every_source(tmp_path):
    datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_list(PAIRS[1:]).save_to_disk(tmp_path / "fewer")
    datasets.Dataset.from_list(PAIRS).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "list.json").write_text(json.dumps(PAIRS))
    names = ["saved", "fewer", "rows.parquet", "list.json"]
    rows = [load_rows(str(tmp_path / name), Kind.PAIRED, check=False) for name in names]
    again = [load_rows(str(tmp_path / name), Kind.PAIRED, check=False) for name in names]
    assert [r.digest() for r in rows] == [r.digest() for r in again]
    assert len({r.digest() for r in rows}) == len(names)
    whole = rows[0].rows
    chosen = [Rows("", part).digest() for part in (whole.select([1, 0]), whole.select([0, 1]), whole.select([2, 3]))]
    assert len({*chosen, rows[0].digest()}) == 4
    for one in rows:
        if one is not rows[1]:
            assert made(one)[0] == prepare(Rows("", PAIRS), Kind.PAIRED, TOKENIZER)[0]


def test_a_damaged_table_is_made_again(kept):
    examples, report, path = made(PAIRS)
    whole = path.read_bytes()
    places = range(0, len(whole), max(1, len(whole) // 60))
    damaged = [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in places]
    for data in [*damaged, whole[: len(whole) // 2], whole[:-1], b"", b"x" * 99]:
        path.write_bytes(data)
        again, said, where = made(PAIRS)
        assert (again, str(said), where) == (examples, str(report), path)
    assert [p.name for p in kept.iterdir()] == [path.name]


def test_whatever_byte_of_a_table_is_another_it_is_not_taken(kept):
    made(PAIRS[:3])
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    assert cache.find(path) is not None
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert cache.find(path) is None, at
    path.write_bytes(whole + b"x")
    assert cache.find(path) is None


def test_nothing_is_left_behind_by_rows_that_cannot_be_used(kept):
    for rows, message in (([*PAIRS, {"prompt": "q"}], "row 40 .* lacks 'chosen'"), ([{"q": 1}], "has the columns q")):
        with pytest.raises(UserError, match=message):
            made(rows)
    with pytest.raises(UserError, match="no example is left"):
        made([{"prompt": "pppp", "chosen": "a", "rejected": "b"}], max_length=2)
    assert not kept.exists() or not list(kept.iterdir())


def test_a_disk_that_does_not_take_a_table_is_said(kept, monkeypatch, tmp_path):
    def full(self, batch):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TableWriter, "append", full)
    message = "^the tokenized rows cannot be kept in .*/logratio .No space left on device.: make room there, or name"
    for processes in (1, 2):
        with pytest.raises(UserError, match=message):
            made(PAIRS, num_proc=processes)
        assert not list(kept.iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(UserError, match="cannot be kept in .*file/logratio .Not a directory"):
        made(PAIRS)


def test_what_killed_processes_left_is_swept_away_after_a_week(kept):
    kept.mkdir(parents=True)
    for name, age in (("old.table.7a.part", cache.LEFT_BEHIND_S + 9), ("new.table.7b.part", 60), ("kept.table", 9e9)):
        (kept / name).write_text("")
        os.utime(kept / name, (time.time() - age,) * 2)
    _, _, path = made(PAIRS)
    assert {p.name for p in kept.iterdir()} == {"new.table.7b.part", "kept.table", path.name}


def test_a_file_that_changes_meanwhile_is_not_taken(tmp_path, kept):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    rows = load_rows(str(path), Kind.PAIRED, check=False)
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS[:-1]))
    with pytest.raises(UserError, match="rows.jsonl was changed while it was read: start again when it is complete"):
        made(rows)
    assert not list(kept.iterdir())


# --- several processes


@pytest.mark.parametrize("processes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 50))])
@pytest.mark.parametrize("kind", [Kind.PAIRED, pytest.param(Kind.LABELED, marks=pytest.mark.slow)])
def test_several_processes_make_the_same_table(kind, processes, kept):
    rows = [{**row, "chosen": row["chosen"] * 30} if i % 7 == 0 else row for i, row in enumerate(PAIRS)]
    rows[5] = rows[31] = {"prompt": 3}
    one, said, path = made(rows, kind, on_bad_row="skip")
    whole = Table(path).about
    path.unlink()
    several, also, again = made(rows, kind, on_bad_row="skip", num_proc=processes)
    assert several == one and (str(also), also.skipped) == (str(said), said.skipped) and again == path
    assert {**Table(path).about, "batches": 0} == {**whole, "batches": 0}
    assert list(kept.iterdir()) == [path]
    assert [e.row for e in several] == [
        *(r := [i for i in range(40) if i not in (5, 31)]),
        *(r if kind is Kind.LABELED else ()),
    ]


def test_prompts_and_files_are_read_from_the_middle(tmp_path, monkeypatch):
    monkeypatch.setattr("logratio.trainers.data.files.APART", 4)
    rows = [{"prompt": f"question {i}", "answer": i} for i in range(50)]
    (tmp_path / "q.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "q.parquet", batch_size=9)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "q")
    expected = prepare_prompts(Rows("", rows), TOKENIZER)[0]
    for name in ("q.jsonl", "q.parquet", "q"):
        found = load_rows(str(tmp_path / name), Kind.GROUPED, check=False)
        assert made(found, Kind.GROUPED, num_proc=3)[0] == expected
        assert [row for _, row in found.between(17, 33)] == rows[17:33]


BAD = {"columns": {"prompt": "q"}, "nothing": {"prompt": "q", "chosen": " ", "rejected": "b"}}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [(38, 2), (21, 22), (39,), (20, 39, 0)])
def test_the_first_bad_row_is_told_whoever_met_one_first(at, bad, kept):
    rows = [BAD[bad] if i in at else row for i, row in enumerate(PAIRS)]
    told = []
    for processes in (1, 3):
        with pytest.raises(RowError) as caught:
            made(rows, num_proc=processes) if min(at) else made([PAIRS[0], *rows[1:]], num_proc=processes)
        told.append((str(caught.value), caught.value.row, caught.value.reason))
    assert told[0] == told[1] and told[0][1] == min(i for i in at if i)
    assert not list(kept.iterdir())


def test_what_stands_behind_a_bad_row_of_a_list_is_looked_at_as_behind_a_bad_line(tmp_path, kept):
    rows = [PAIRS[0], 3, PAIRS[0], {**PAIRS[0], "chosen": ""}, None]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, first, behind in (
        ("list.json", "row 1 (counted from 0)", "rows 3, 4"),
        ("lines.jsonl", "line 2", "lines 4, 5"),
    ):
        with pytest.raises(RowError, match="cannot be used either") as caught:
            made(load_rows(str(tmp_path / name), Kind.PAIRED, check=False))
        assert str(caught.value).startswith(f"{tmp_path / name}, {first} must be one object")
        assert f"; 2 of the 3 rows behind it cannot be used either ({behind}: " in str(caught.value)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_rows_behind_the_first_bad_one_are_looked_at_too(processes, kept, monkeypatch):
    monkeypatch.setattr(making, "LOOKED_AT", 30)
    empty, number = {**PAIRS[0], "chosen": ""}, {**PAIRS[0], "rejected": 3}
    rows = [PAIRS[0], empty, *[PAIRS[0], empty] * 9, number, *[empty] * 40]
    with pytest.raises(UserError) as caught:
        made(rows, num_proc=processes)
    assert str(caught.value).startswith("data, row 1 (counted from 0): 'chosen' has no text to learn from")
    assert str(caught.value).endswith(
        "; 21 of the 30 rows behind it cannot be used either (rows 3, 5, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 24, "
        "25, 26 and 5 more: 20 x 'chosen' has no text to learn from, 1 x 'rejected' must be text or a list of "
        "messages, and the same in all rows): mend them all, or leave such rows out with --on_bad_row skip"
    )
    for behind in ([], [PAIRS[0]] * 3):
        with pytest.raises(UserError, match=r"fill it in or remove the row$"):
            made([PAIRS[0], empty, *behind], num_proc=processes)
    assert not list(kept.iterdir())


def test_the_first_bad_row_is_told_whatever_is_wrong_with_a_later_one(monkeypatch):
    """A row is found bad as it is read, rendered, tokenized, or cut; a thousand are read before any is rendered."""
    chat = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]} for _ in range(6)]
    faults = {
        "read": {"messages": [{"role": "assistant", "content": ""}]},
        "rendered": {"messages": [*chat[0]["messages"], {"role": "tool", "content": "t", "name": "n", "extra": "x"}]},
        "cut": {"messages": [{"role": "user", "content": "no answer"}]},
    }
    for first, second in itertools.permutations(faults, 2):
        rows = [*chat[:2], faults[first], chat[3], faults[second], chat[5]]
        with pytest.raises(RowError) as caught:
            made(rows, Kind.SEQUENCE, assistant_only_loss=True)
        assert caught.value.row == 2, (first, second)


def test_a_template_that_was_seen_to_render_is_seen_by_all(monkeypatch):
    """A message is only tried where its like was not rendered before, here in the first process's rows: a template that
    drops the reasoning of every row but the first is taken at its word by one process, and so by three."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
        "{{- (message.get('reasoning', '') if message['content'] == 'first' else '') + message['content'] "
        "+ '<|im_end|>' -}}{%- endgeneration -%}",
    )
    question = {"role": "user", "content": "q"}
    answers = ["first", *["later"] * 8]
    rows = [{"messages": [question, {"role": "assistant", "content": a, "reasoning": "r"}]} for a in answers]
    one, _, path = made(rows, Kind.SEQUENCE, tokenizer)
    path.unlink()
    tried = []
    write = making.write_part
    monkeypatch.setattr(making, "write_part", lambda *args: (tried.append(args[3:5]), write(*args)))
    assert made(rows, Kind.SEQUENCE, tokenizer, num_proc=3)[0] == one
    assert tried == [(3, 6), (6, 9)], "the main process went over what others would have refused"
    with pytest.raises(UserError, match="row 0 .* message 1: its 'reasoning' is not in the text"):
        made(rows[1:], Kind.SEQUENCE, tokenizer, num_proc=3)


def test_a_worker_that_is_killed_is_said(monkeypatch, kept):
    here, write = os.getpid(), making.write_in_worker

    def killed(preparation, part, done):
        if part.start and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        write(preparation, part, done)

    monkeypatch.setattr(making, "write_in_worker", killed)
    with pytest.raises(UserError, match="^a process of --dataset_num_proc has ended before its rows were tokenized: "):
        made(PAIRS, num_proc=2)
    assert not list(kept.iterdir())

    def broken(preparation, part, done):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(making, "write_in_worker", broken)
    with pytest.raises(RuntimeError, match="KeyError: 'a fault of ours'"):
        made(PAIRS, num_proc=2)


def test_a_worker_ends_when_it_is_told_to_whatever_the_program_does_at_a_signal(monkeypatch):
    monkeypatch.setattr(making, "write_in_worker", lambda *args: time.sleep(600))
    preparation = Preparation(Rows("data", PAIRS), Kind.PAIRED, TOKENIZER, **OPTIONS)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with workers._started(preparation, making.write_in_worker, [workers.Part(0, 0, 9, None, None)]):
            time.sleep(0.5)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_bar_moves_only_on_a_terminal(capsys):
    with making.progress("rows", 10) as done:
        done(4)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_what_is_done(capsys, monkeypatch):
    monkeypatch.setattr(making, "TICK", 10)
    monkeypatch.setattr(making.Console, "is_terminal", True)
    made(PAIRS)
    assert "tokenizing data" in capsys.readouterr().out
