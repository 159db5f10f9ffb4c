"""Data files, folders and YAML as they lie about: cut, corrupt, of another kind, or not to be read."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TRAIN = "train sft --max_steps 1 --batch_size 2 --output_dir out --dataset_name"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def cut_parquet(path):
    parquet(path)
    cut(path)


def arrow_folder(path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


def cut_arrow(path):
    arrow_folder(path)
    cut(next(path.glob("*.arrow")))


def broken_state(path):
    arrow_folder(path)
    (path / "state.json").write_text("{")


def cut_gzip(path):
    path.write_bytes(gzip.compress(LINES.encode() * 100))
    cut(path)


def folder(path):
    path.mkdir()


def folder_of_notes(path):
    path.mkdir()
    (path / "notes.xyz").write_text("nothing here")


def written(content):
    def write(path):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


BAD = {
    "empty.jsonl": (written(""), "no rows"),
    "blank.jsonl": (written("\n\n  \n"), "no rows"),
    "empty.json": (written("[]"), "no rows"),
    "numbers.json": (written("[1, 2]"), "must be one object"),
    "cut.json": (written('[{"prompt": "a"'), "not valid JSON"),
    "latin.jsonl": (written('{"prompt": "é", "completion": "b"}'.encode("latin-1")), "UTF-8"),
    "utf16.jsonl": (written(LINES.encode("utf-16")), "UTF-8"),
    "zeros.jsonl": (written(b"\x00" * 64), "line 1"),
    "binary.jsonl": (written(bytes(range(256))), "UTF-8"),
    "rows.csv": (written("prompt,completion\na,b\n"), "known type"),
    "rows.txt": (written("hello"), "known type"),
    "text.parquet": (written("hello"), "parquet"),
    "cut.parquet": (cut_parquet, "parquet"),
    "empty.parquet": (written(""), "parquet"),
    "cut.jsonl.gz": (cut_gzip, "cut.jsonl.gz"),
    "folder.jsonl": (folder, "folder.jsonl"),
    "folder": (folder, "folder"),
    "notes": (folder_of_notes, "notes"),
    "cut_arrow": (cut_arrow, "cut_arrow"),
    "broken_state": (broken_state, "broken_state"),
    "./nowhere": (lambda path: None, "nowhere"),
    "nowhere.jsonl": (lambda path: None, "nowhere.jsonl does not exist"),
    "nobody/has-this": (lambda path: None, "nobody/has-this"),
}
GOOD = {
    "bom.jsonl": written("\ufeff" + LINES),
    "dos.jsonl": written(LINES.replace("\n", "\r\n")),
    "no_newline.jsonl": written(LINES.rstrip("\n")),
    "blank_lines.jsonl": written(LINES.replace("\n", "\n\n")),
    "separators.jsonl": written(LINES.replace("=", "\u2028")),
    "list.json": written(json.dumps(ROWS)),
    "rows.parquet": parquet,
    "saved": arrow_folder,
}
YAML = {
    "[1, 2": "cannot be read",
    "- beta": "must map option names",
    "7": "must map option names",
    "betta: 1": "betta: 1: no option here, nor of TRL; did you mean beta?",
    "num_generations: 4": "num_generations: 4: an option of grpo",
    "beta: .nan": "beta",
    "beta: -1": "beta",
    "batch_size: 0": "batch_size",
    "? [a, b]\n: 1": "",
    "beta: !!python/object:os.system 1": "cannot be read",
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_is_named(refused, tmp_path, name):
    make, names = BAD[name]
    make(tmp_path / name)
    refused(f"{TRAIN} {name}", names)


@pytest.mark.parametrize("name", GOOD)
def test_a_file_that_can(run, tmp_path, name):
    GOOD[name](tmp_path / name)
    said = run(f"{TRAIN} {name}")
    assert said.status == 0, said
    assert "4 examples" in said.output


@pytest.mark.parametrize("text", YAML)
def test_yaml(refused, tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    refused("train dpo --dataset_name rows.jsonl --max_steps 1 --config run.yaml", YAML[text])


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_yaml_that_is_no_text(refused, tmp_path, content):
    if content is None:
        (tmp_path / "run.yaml").mkdir()
    else:
        (tmp_path / "run.yaml").write_bytes(content)
    refused("train dpo --dataset_name rows.jsonl --max_steps 1 --config run.yaml", "run.yaml")
