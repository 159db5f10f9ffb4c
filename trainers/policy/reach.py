"""Hugging Face's Hub where it cannot be reached: asked once, and not five times more with a line each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session

SECONDS = 10.0
"""That the Hub has for its first answer."""


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
