"""A checkpoint's folder: there whole or not at all, with a manifest by which damage is found and named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError, first_line

MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")
# Beside a checkpoint: while it is written, and while one is on its way out. Neither is ever taken for one.
UNFINISHED = ".checkpoint-*"


def name_of(step: int) -> str:
    return f"checkpoint-{step}"


def write_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a folder beside, flush that to the disk, and give it the name of `folder`.

    Raises UserError where the disk does not take it; what was there before is as it was.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with set_aside(partial, f"{folder} could not be saved"):
        fill(partial)
        write_manifest(partial)
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        if folder.exists():  # a damaged one, or one of the same step before the run went back
            remove(folder)
        partial.rename(folder)
        flush(folder.parent)


@contextlib.contextmanager
def set_aside(partial: Path, what: str) -> Iterator[None]:
    """Inside, `partial` is an empty folder to write into, which is removed whatever ends the writing. What libraries
    raise where a disk does not take their files becomes a UserError that begins with `what`."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # tokenizers raises a plain Exception that quotes the system's error
        if not isinstance(error, OSError | SafetensorError) and "os error" not in str(error):
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise UserError(f"{what}: {reason}") from error


def flush(path: Path) -> None:
    """Let the file's content, or the folder's entries, be on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Take a checkpoint away; it is none from the first moment on."""
    gone = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_unfinished(output_dir: Path) -> None:
    """Of a run that was killed in a save."""
    for path in output_dir.glob(UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(manifest_text(files))


def manifest_text(files: object) -> str:
    """The files with a hash over what is said of them, in the one way to write it."""
    content = json.dumps(files, indent=2, sort_keys=True)
    return json.dumps({"files": files, "sha256": hashlib.sha256(content.encode()).hexdigest()}, indent=2) + "\n"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: the first file that is missing or not what the manifest says; None: nothing."""
    try:
        text = (folder / MANIFEST).read_text()
        files = json.loads(text)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or cannot be read"
    if text != manifest_text(files):
        return f"{MANIFEST} is not as it was written"
    for name, known in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != known["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {known['bytes']}"
            if sha256(path) != known["sha256"]:
                return f"{name} is not as it was written (its SHA-256 is another)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def checkpoints_in(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each, the latest first."""
    found = [(match, path) for path in output_dir.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in found if path.is_dir()), reverse=True)


def find(asked: str, output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what to tell about it.

    asked: `latest`, the last one in `output_dir` that is whole (None: there is none, so the run begins), or a folder.
    Raises UserError for a folder that is no whole checkpoint.
    """
    if asked == "latest":
        notes: list[str] = []
        for _, folder in checkpoints_in(output_dir):
            problem = damage(folder)
            if problem is None:
                return folder, [*notes, f"going on from {folder}"]
            notes.append(f"{folder} is damaged and left aside: {problem}")
        return None, [*notes, f"{output_dir} has no checkpoint to go on from: the run begins"]
    folder = Path(asked)
    if not folder.is_dir():
        raise UserError(f"--resume_from_checkpoint {asked}: there is no such folder; give a checkpoint-N, or latest")
    problem = damage(folder)
    if problem is None:
        return folder, [f"going on from {folder}"]
    if not (folder / MANIFEST).exists() and not NAME.fullmatch(folder.name):
        raise UserError(f"--resume_from_checkpoint {asked} is no checkpoint: it has no {MANIFEST}; give a checkpoint-N")
    whole = next((path for _, path in checkpoints_in(folder.parent) if path != folder and damage(path) is None), None)
    raise UserError(f"--resume_from_checkpoint {asked} is damaged: {problem}{f'; {whole} is whole' if whole else ''}")


def keep_latest(output_dir: Path, limit: int | None, *, also: int | None = None) -> None:
    """Remove all but the last `limit` checkpoints; the one of step `also` stays, and is one of them."""
    if limit is None:
        return
    kept = [step for step, _ in checkpoints_in(output_dir) if step == also]
    for step, folder in checkpoints_in(output_dir):
        if step in kept:
            continue
        if len(kept) < limit:
            kept.append(step)
        else:
            remove(folder)
