"""What is loaded by transformers out of a folder or from Hugging Face's Hub.

A Hub that cannot be reached is asked once, and not five times more with a line each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from ..errors import UserError
from .checks import foreign

SECONDS = 10.0
"""That the Hub has for its first answer."""


def loaded(kind: Any, name: str, what: str, *, revision: str | None = None, **options: Any) -> Any:
    """`kind.from_pretrained(name, ...)`, of an Auto class; UserError, which begins with `what`, where it cannot be.

    revision: a branch, a tag or a commit of the Hub's; None: its main branch.

    Code that lies beside the files is never run: transformers would ask for it on the terminal, in the middle of a run.
    """
    if revision is not None:
        what, options = f"{what} at revision {revision}", options | {"revision": revision}
    with foreign(what), asking_once(name):
        try:
            return kind.from_pretrained(name, trust_remote_code=False, **options)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(
                f"{what}: it needs code of its own; only what transformers itself knows is taken"
            ) from error


@contextlib.contextmanager
def asking_once(name: str) -> Iterator[None]:
    """Inside, where `name` is no folder and the Hub does not answer at all, its client works offline: with what was
    downloaded before, or at once with an error."""
    kept = constants.HF_HUB_OFFLINE
    if not kept and not Path(name).is_dir():
        constants.HF_HUB_OFFLINE = not answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = kept


def answers() -> bool:
    """Whether there is a way to the Hub; whatever it answers."""
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of whatever library the client uses: no connection, no name, no time
        return False
    return True
