"""The embedded data set `arithmetic`: two-digit additions, whose answers can be checked."""

from __future__ import annotations

from typing import Any

from logratio.losses import Kind


def arithmetic_rows(kind: Kind, split: str = "train", seed: int = 0) -> list[dict[str, Any]]:
    """Rows of one split ("train" or "test"; their questions are disjoint) in the columns that `kind` needs."""
    raise NotImplementedError
