"""A checkpoint's folder: whole or not at all, and every way in which a disk may have spoilt it is named."""

import json
from pathlib import Path

import pytest

from logratio.trainers.checkpoints import folder
from logratio.trainers.checkpoints.folder import checkpoints_in, damage, find, keep_latest, name_of, write_whole
from logratio.trainers.errors import UserError

FILES = {"weights.safetensors": b"\x00" * 100, "state.json": b'{"step": 3}\n', "sub/tokenizer.json": b"{}"}


def fill(target: Path) -> None:
    for name, content in FILES.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)


def checkpoint(where: Path, step: int) -> Path:
    write_whole(where / name_of(step), fill)
    return where / name_of(step)


def test_what_is_written_is_whole_and_nothing_else_is_left(tmp_path):
    assert damage(checkpoint(tmp_path, 3)) is None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    assert {str(p.relative_to(tmp_path / "checkpoint-3")) for p in tmp_path.rglob("*") if p.is_file()} == {
        *FILES,
        "manifest.json",
    }


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_byte_that_changed_is_found_in_every_file(tmp_path, name):
    path = checkpoint(tmp_path, 3) / name
    content = path.read_bytes()
    for at in range(0, len(content), max(1, len(content) // 25)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert (damage(path.parents[name.count("/")]) or "").startswith(name), at
    path.write_bytes(content)
    assert damage(path.parents[name.count("/")]) is None


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_file_that_is_missing_or_short_is_named(tmp_path, name):
    path = checkpoint(tmp_path, 3) / name
    root = path.parents[name.count("/")]
    path.write_bytes(path.read_bytes()[:-1])
    assert damage(root).startswith(name)
    path.unlink()
    assert damage(root).startswith(f"{name} is missing")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("No space left (os error 28)")])
def test_a_disk_that_takes_no_more_leaves_what_was_there(tmp_path, error):
    """tokenizers raises a plain Exception that quotes the system's error."""
    kept = checkpoint(tmp_path, 3)

    def full(target):
        fill(target)
        raise error

    for step in (3, 4):
        with pytest.raises(UserError, match=f"checkpoint-{step} could not be saved: No space left"):
            write_whole(tmp_path / name_of(step), full)
    assert damage(kept) is None and [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_an_error_that_is_none_of_the_disks_passes(tmp_path):
    def broken(target):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "checkpoint-1", broken)


def test_the_latest_whole_one_is_taken_and_damaged_ones_are_named(tmp_path):
    first, second, third = (checkpoint(tmp_path, step) for step in (2, 9, 10))
    assert [step for step, _ in checkpoints_in(tmp_path)] == [10, 9, 2]
    assert find("latest", tmp_path) == (third, [f"going on from {third}"])
    (third / "state.json").write_text('{"step": 4}\n')
    (second / "manifest.json").unlink()
    assert find("latest", tmp_path) == (
        first,
        [
            f"{third} is damaged and left aside: state.json is not as it was written (its SHA-256 is another)",
            f"{second} is damaged and left aside: manifest.json is missing or cannot be read",
            f"going on from {first}",
        ],
    )
    assert find(str(first), tmp_path / "elsewhere") == (first, [f"going on from {first}"])
    with pytest.raises(
        UserError, match=f"^--resume_from_checkpoint {third} is damaged: state.json .*; {first} is whole$"
    ):
        find(str(third), tmp_path)


def test_without_a_checkpoint_the_run_begins_and_says_so(tmp_path):
    assert find("latest", tmp_path) == (None, [f"{tmp_path} has no checkpoint to go on from: the run begins"])
    (tmp_path / "some").mkdir()
    for asked, message in {
        "some": "is no checkpoint: it has no manifest.json",
        "other": "there is no such folder",
    }.items():
        with pytest.raises(UserError, match=message):
            find(str(tmp_path / asked), tmp_path)


def test_the_latest_and_the_best_are_kept(tmp_path):
    for step in range(1, 6):
        checkpoint(tmp_path, step)
        keep_latest(tmp_path, 2, also=2 if step > 1 else 1)
        kept = [s for s, _ in checkpoints_in(tmp_path)]
        assert kept == {1: [1], 2: [2, 1][: 2 if step > 1 else 1], 3: [3, 2], 4: [4, 2], 5: [5, 2]}[step]
    keep_latest(tmp_path, None)
    assert len(checkpoints_in(tmp_path)) == 2


def test_one_that_is_on_its_way_in_or_out_is_none(tmp_path, monkeypatch):
    """A kill between any two operations leaves no folder of that name that is not whole."""
    checkpoint(tmp_path, 1)
    monkeypatch.setattr(folder.shutil, "rmtree", lambda *a, **k: None)  # as if killed in it
    folder.remove(tmp_path / "checkpoint-1")
    (tmp_path / ".checkpoint-2.partial").mkdir()
    assert checkpoints_in(tmp_path) == []
    monkeypatch.undo()
    folder.remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_can_be_read_by_others(tmp_path):
    """`sha256sum` says the same."""
    root = checkpoint(tmp_path, 1)
    known = json.loads((root / "manifest.json").read_text())["files"]["sub/tokenizer.json"]
    assert known == {"bytes": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}
