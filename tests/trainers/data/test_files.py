"""Files as people have them: what is read although it is odd, and the one sentence for what cannot be."""

import gzip
import json

import datasets
import pyarrow.parquet
import pytest

from logratio.losses import Kind
from logratio.trainers.data import rows as rows_module
from logratio.trainers.data.files import FILE_TYPES, parse_json
from logratio.trainers.data.rows import load_rows
from logratio.trainers.errors import RowError, UserError


def packed(data: bytes) -> bytes:
    """Without the time of day, which would name a test otherwise in each process."""
    return gzip.compress(data, mtime=0)


ROWS = [{"text": "a é"}, {"text": "b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def load(path, **options):
    return load_rows(str(path), Kind.SEQUENCE, **options)


@pytest.mark.parametrize(
    "name, data",
    [
        ("mark.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("marks.jsonl", b"".join(b"\xef\xbb\xbf" + line.encode() + b"\n" for line in LINES.splitlines())),
        ("windows.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("old-mac.jsonl", LINES.replace("\n", "\r").encode()),
        ("mark.json", b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False, indent=1).encode()),
        ("list.jsonl", json.dumps(ROWS, ensure_ascii=False).encode()),
        ("packed.jsonl.gz", packed(LINES.encode())),
        ("packed.json.gz", packed(json.dumps(ROWS).encode())),
        ("two-members.jsonl.gz", packed(b'{"text": "a \\u00e9"}\n') + packed(b'{"text": "b"}\n')),
        ("CAPITAL.JSONL", LINES.encode()),
    ],
)
def test_odd_files_give_the_same_rows(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert list(load(tmp_path / name)) == ROWS


def test_a_folder_finds_a_packed_split_and_refuses_two(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(packed(LINES.encode()))
    assert list(load(tmp_path)) == ROWS
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(UserError, match="holds train.json and train.jsonl.gz, each of which may be the split 'train'"):
        load(tmp_path)


DEEP = "[" * 100_000
BROKEN = {
    "empty.jsonl": (b"", "has no rows"),
    "nothing.json": (b"[]", "has no rows"),
    "binary.jsonl": (bytes(range(256)), "is not UTF-8 text (byte 128): save it as UTF-8"),
    "nul.jsonl": (b'{"text": "a\0"}', ", line 1, column 12 is not valid JSON: Invalid control character at"),
    "utf16.jsonl": (LINES.encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
    "cut.jsonl": (LINES.encode()[:-4], ", line 2, column 10 is not valid JSON: Unterminated string starting at"),
    "digits.jsonl": (b'{"text": ' + b"9" * 5000 + b"}", ", line 1 has a number of too many digits"),
    "digits.json": (b"[" + b"9" * 5000 + b"]", " has a number of too many digits"),
    "deep.jsonl": (b'{"text": ' + DEEP.encode() + b"}", ", line 1 is nested too deeply"),
    "deep.json": (DEEP.encode(), " is nested too deeply"),
    "twice.jsonl": (b'{"text": "a"}\n{"text": "b", "text": "c"}', ", line 2 has the key 'text' twice in one object"),
    "object.json": (json.dumps({"data": ROWS}, indent=1).encode(), " holds a single object over several lines: write"),
    "list.json": (b'[{"text": "a"}, 3]', ", row 1 (counted from 0) must be one object, got int 3"),
    "cut.jsonl.gz": (packed(LINES.encode())[:-9], " cannot be read: Compressed file ended before the end-of"),
    "not.jsonl.gz": (LINES.encode(), " cannot be read: Not a gzipped file"),
    "broken.json.gz": (packed(LINES.encode())[:10] + b"\xff" * 20, " cannot be read: Error -3 while"),
    "table.csv": (
        b"text\na\n",
        f" is no data file of a known type: expected {', '.join(FILE_TYPES)} (or a folder, from",
    ),
    "cut.jsonl.zst": (b"(\xb5/\xfd", " is no data file of a known type"),
    "empty.parquet": (b"", " cannot be read as parquet: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_one_sentence(name, tmp_path):
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        load(tmp_path / name)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / name}{message}" if message[0] in ", " else f"{tmp_path / name} {message}")
    assert "\n" not in text


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path):
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["text", "text"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice\.parquet has the column 'text' twice: remove or rename one$"):
        load(tmp_path / "twice.parquet")


def test_a_damaged_parquet_file_is_one_sentence(tmp_path):
    datasets.Dataset.from_list(ROWS * 500).to_parquet(tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    damaged = [whole[: len(whole) // 2], whole[:20] + b"\0" * 40 + whole[60:], whole[:-60] + b"\xff" * 40 + whole[-20:]]
    for index, data in enumerate(damaged):
        path = tmp_path / f"{index}.parquet"
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"{index}\.parquet cannot be read as parquet: [^\n]+$"):
            load(path)


def test_values_that_python_cannot_hold_are_one_sentence(tmp_path):
    far = pyarrow.array([2**62], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"text": far}), tmp_path / "far.parquet")
    with pytest.raises(UserError, match="far.parquet cannot be read as parquet: "):
        load(tmp_path / "far.parquet")


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_a_damaged_saved_data_set_is_one_sentence(file, damage, tmp_path):
    datasets.Dataset.from_list(ROWS * 5000).save_to_disk(tmp_path)
    path = tmp_path / file
    if damage == "gone":
        path.unlink()
        if file == "state.json":  # then it is a folder with an arrow file, which datasets reads
            assert len(load(tmp_path)) == 10_000
            return
    else:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"[]" + b"\x01" * 2000)
    with pytest.raises(UserError) as caught:
        list(load(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_folders_without_data_and_folders_called_like_files(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.bin").write_bytes(b"x")
    for name in ("empty", "other"):
        with pytest.raises(UserError, match=rf"the data set '.*{name}' .split 'train'. cannot be loaded: .*data files"):
            load(tmp_path / name)
    (tmp_path / "rows.jsonl").mkdir()
    (tmp_path / "rows.jsonl" / "part-0.json").write_text(LINES)
    assert list(load(tmp_path / "rows.jsonl")) == ROWS


def test_a_broken_file_in_a_folder_says_what_was_behind_it(tmp_path):
    (tmp_path / "part.jsonl").write_text('{"text": "a"\n')
    with pytest.raises(UserError, match="An error occurred while generating the dataset: JSON parse error"):
        load(tmp_path)


def test_names_that_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--dataset_name is empty"):
        load(" ")
    with pytest.raises(UserError, match="/dev/null is neither a file nor a folder"):
        load("/dev/null")
    with pytest.raises(UserError, match="cannot be opened: File name too long"):
        load("x" * 5000)
    (tmp_path / "a.jsonl").write_text(LINES)

    def denied(path, *mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(rows_module.Path, "open", denied)
    with pytest.raises(UserError, match="a.jsonl cannot be read: Permission denied$"):
        load(tmp_path / "a.jsonl")
    monkeypatch.setattr(rows_module.Path, "is_file", denied)
    with pytest.raises(UserError, match="a.jsonl cannot be opened: Permission denied$"):
        load(tmp_path / "a.jsonl")


def test_a_row_that_datasets_cannot_decode_is_named():
    def decoding():
        yield ROWS[0]
        raise ImportError("To support decoding images, please install 'Pillow'.")

    with pytest.raises(UserError, match=r"pictures, row 1 .* cannot be read: To support decoding images, please"):
        list(rows_module.Rows("pictures", decoding()))


def test_bad_lines_are_kept_in_their_place_where_asked(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": \n3\n{"text": "b"}\n')
    rows = load(tmp_path / "a.jsonl", check=False)
    first, cut, number, last = rows
    assert (first, last) == ({"text": "a"}, {"text": "b"}) and rows.lines == [1, 3, 4, 5]
    assert isinstance(cut, RowError) and isinstance(number, RowError)
    assert (cut.row, cut.reason) == (1, "column 10 is not valid JSON: Expecting value")
    assert (number.row, str(number)) == (2, f"{tmp_path}/a.jsonl, line 4 must be one object, {{...}}, got int 3")


def test_parsed_json_is_what_json_says():
    assert parse_json('{"a": [1, {"b": null}], "c": "\\ud83d\\ude00"}') == {"a": [1, {"b": None}], "c": "😀"}
