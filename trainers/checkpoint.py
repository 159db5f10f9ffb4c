"""Saving: a PEFT adapter or a full model that `from_pretrained` loads, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .policy.policy import Policy


def save(policy: Policy, tokenizer: Any, folder: Path) -> None:
    """Write the trained adapter (the reference's copy is left out) or the whole model, and the tokenizer.

    Everything is written beside its place first and then moved in, file by file, so that no file is ever half there.
    """
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    options: dict[str, Any] = {"selected_adapters": ["default"]} if policy.has_adapters else {}
    policy.model.save_pretrained(partial, **options)
    tokenizer.save_pretrained(partial)
    for file in partial.iterdir():
        file.replace(folder / file.name)
    partial.rmdir()
