"""Where tokenized tables are kept, and by what they are found again.

A table lies in the folder `logratio` of Hugging Face's cache of data sets (HF_DATASETS_CACHE), named by a SHA-256 of
all that it comes from: what the rows say (not where they lie), the tokenizer, the options, the versions of what renders
and tokenizes, and the sources of this room, so that a table of an older form is never taken for one of this. It is
written beside its place, and renamed when it is whole; it is read through before it is used, and one that does not hold
what was written is made again.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from ...errors import UserError
from ..rows import Rows
from .stored import Table, is_whole

UNFINISHED = ".part"
LEFT_BEHIND_S = 7 * 24 * 3600.0  # what is unfinished for so long was left by a process that was killed


def folder() -> Path:
    """Of the tables. datasets takes a second to import, and knows its place."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "logratio"


def key(rows: Rows, tokenizer: Any, options: dict[str, Any]) -> str:
    """What a table of these rows is found by. options: what `Preparation` is given beside them."""
    said = {
        "rows": rows.digest(),
        "tokenizer": tokenizer_digest(tokenizer),
        "options": {name: str(value) for name, value in options.items()},
        "versions": [transformers.__version__, tokenizers.__version__],
        "sources": _sources_digest(),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary, the chat template, the special tokens, and what else decides on ids."""
    found = hashlib.sha256(f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # what the last call asked for
            whole.pop(passing, None)
        found.update(json.dumps(whole, sort_keys=True).encode())
    else:
        found.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
        found.update(repr(sorted((name, str(value)) for name, value in tokenizer.init_kwargs.items())).encode())
    template = tokenizer.chat_template
    said = [
        template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        sorted((index, str(token)) for index, token in tokenizer.added_tokens_decoder.items()),
        [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "split_special_tokens")],
        # a template that writes the date renders otherwise tomorrow
        datetime.date.today().isoformat() if "strftime_now" in json.dumps(template) else None,
    ]
    found.update(json.dumps(said, sort_keys=True, default=str).encode())
    return found.hexdigest()


@cache
def _sources_digest() -> str:
    room = Path(__file__).parents[1]
    found = hashlib.sha256()
    for file in sorted(room.rglob("*.py")):
        found.update(f"{file.relative_to(room)}\n".encode() + file.read_bytes())
    return found.hexdigest()


def find(path: Path) -> Table | None:
    """The table that is there, if it is whole."""
    with contextlib.suppress(OSError):
        if is_whole(path):
            return Table(path)
    return None


@contextlib.contextmanager
def place(path: Path) -> Iterator[Path]:
    """Inside, a path to write to, from which further names may be made; then it is renamed to `path`, whole.

    Raises UserError where the disk does not take it. Nothing is left behind.
    """
    own = path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"*{UNFINISHED}*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > LEFT_BEHIND_S:
                    left.unlink()
        yield own
        with own.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(own, path)
    except OSError as error:
        raise UserError(
            f"the tokenized rows cannot be kept in {path.parent} ({error.strerror or error}): make room there, or name "
            "another folder in the environment as HF_DATASETS_CACHE"
        ) from error
    finally:
        for left in path.parent.glob(f"{own.name}*"):
            left.unlink(missing_ok=True)
