"""The folder that a run writes to: whether it can, whether another run's model is in the way, and whose it is now."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from ..config import RunConfig
from ..errors import UserError, first_line
from .folder import checkpoints_in, remove_unfinished

BASE_MODEL = "base_model"
"""Folder in `output_dir` for the embedded model that an adapter was trained on, which has no name to be loaded by."""
# What `save` writes. Two kinds in one folder would load together: a model with another one's adapter or chat template.
MODEL_FILES = (
    *("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"),
    *("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "checkpoint-*", BASE_MODEL),
)
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*")
LOCK = ".lock"
SLACK = 64 * 2**20  # bytes, for the log and the tokenizer


def check_output(config: RunConfig) -> None:
    """Raise UserError unless `output_dir` can be written to and holds no model, or one that may be replaced or that the
    run goes on with."""
    name = config.train.output_dir
    folder = Path(name)
    if not name.strip():
        raise UserError("--output_dir is empty; give a folder")
    try:
        existing = nearest(folder)
        if not existing.is_dir():
            kind = "a file" if existing.exists() else "a link that leads nowhere"
            if existing == folder.absolute():
                raise UserError(f"--output_dir {name} is {kind}; give a folder")
            raise UserError(f"--output_dir {name} cannot be made, because {existing} is {kind}; give another folder")
        if len(max(folder.parts, key=len, default="").encode()) > os.pathconf(existing, "PC_NAME_MAX"):
            raise UserError(f"--output_dir {name[:40]}... has a name too long for a folder; give a shorter one")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise UserError(f"--output_dir {name} cannot be written to ({reason}); give another folder") from error
    found = model_files(folder)
    if not found or goes_on_in(config, folder):
        return
    if not config.train.overwrite_output_dir:
        on = ", go on with it by --resume_from_checkpoint latest" if checkpoints_in(folder) else ""
        raise UserError(
            f"--output_dir {name} holds {held(folder, found)}; choose another folder{on}, or replace it with "
            "--overwrite_output_dir"
        )
    for option in (
        "model_name_or_path",
        "adapter_name_or_path",
        "ref_model_name_or_path",
        "teacher_model_name_or_path",
    ):
        start = getattr(config.model, option)
        at = Path(start or "").resolve()
        if start and (at == folder.resolve() or any(at.is_relative_to(p.resolve()) for p in found)):
            raise UserError(
                f"--overwrite_output_dir would remove --{option} {start}, which training starts from; choose another "
                "--output_dir"
            )


def held(folder: Path, found: Sequence[Path]) -> str:
    """What a folder holds, in words: a model, or a run that stopped before it had saved one. found: its files."""
    step = last_step(folder)
    if any(path.match(pattern) for path in found for pattern in WEIGHTS) or step is None:
        return f"another run's model ({found[0].name})"
    return f"a run that stopped at step {step}, {'with a' if checkpoints_in(folder) else 'without a'} checkpoint"


def last_step(folder: Path) -> int | None:
    """Of the last whole line of the folder's metrics.jsonl."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return None
    for line in reversed(lines[-2:]):  # the last may be cut
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return None


def goes_on_in(config: RunConfig, folder: Path) -> bool:
    """Whether what is in the folder is of the run that goes on."""
    asked = config.save.resume_from_checkpoint
    if asked == "latest":
        return bool(checkpoints_in(folder))
    return asked is not None and Path(asked).resolve().parent == folder.resolve()


def nearest(folder: Path) -> Path:
    """The folder itself, or what exists of the way to it."""
    folder = folder.absolute()
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def model_files(folder: Path) -> list[Path]:
    """Files and folders of a saved model, its tokenizer and its checkpoints."""
    return sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern)) if folder.is_dir() else []


def clear(folder: Path) -> None:
    """Remove another run's model and checkpoints; logs, reference log-probs and all else stay."""
    remove_unfinished(folder)
    for path in model_files(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_room(name: str, model_bytes: int, copies: int) -> None:
    """Raise UserError where the disk does not hold `copies` saved models."""
    free = shutil.disk_usage(nearest(Path(name))).free
    needed = model_bytes * copies + SLACK
    if needed > free:
        raise UserError(
            f"--output_dir {name} has {free / 2**30:.2f} GiB free, but what is to be saved there ({copies} x the "
            f"weights) takes {needed / 2**30:.2f}; make room, or save less often (--save_steps)"
        )


@contextlib.contextmanager
def locked(name: str, *, main: bool) -> Iterator[None]:
    """Inside, the folder is this run's alone; the system gives it up with the process, however that ends.

    Raises UserError where another run has it. main: else nothing is done. A folder made for it that is still empty at
    the end is removed.
    """
    folder = Path(name)
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)] if name.strip() else []
    file = None
    if main and name.strip():
        with contextlib.suppress(OSError, ValueError):  # of which `check_output` says more
            folder.mkdir(parents=True, exist_ok=True)
            file = take_lock(folder / LOCK, name)
    try:
        yield
    finally:
        if file is not None:
            (folder / LOCK).unlink(missing_ok=True)
            file.close()
        for path in made if main else ():
            with contextlib.suppress(OSError):
                path.rmdir()


def take_lock(path: Path, name: str) -> IO[str]:
    """The open file that holds the lock; UserError where another run's does, OSError where the disk knows no locks."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise UserError(
                f"--output_dir {name} is in use by another run ({owner or 'just started'}); wait for it, or choose "
                "another folder"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its owner has just removed it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    return file
