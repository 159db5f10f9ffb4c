"""Who sees whom in a packed batch: one rule, asked of all pairs for a dense mask or inside a kernel (`flex.py`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.packing import PackedBatch


class Token(NamedTuple):
    """What the rule asks about a token; of many tokens at once, tensors that broadcast.

    place: in its row. group, segment: as in `PackedBatch`. position: in its own sequence. first: the first position
    that it sees, which a sliding window moves up.
    """

    place: Any
    group: Any
    segment: Any
    position: Any
    first: Any


def may_see(query: Token, key: Token) -> Tensor:
    """Whether `query` sees `key`: of its own group, in the prompt or its own completion, not behind it and in reach.

    Every token sees itself, padding too: a row of a softmax that sees nothing is NaN.
    """
    same_group = (query.group == key.group) & (key.group >= 0)
    on_path = (key.segment == 0) | (key.segment == query.segment)
    in_reach = (key.place <= query.place) & (key.position >= query.first)
    return (same_group & on_path & in_reach) | (query.place == key.place)


def tokens(batch: PackedBatch, window: int | None = None) -> Token:
    """All tokens of a batch, five [R, L] tensors. A window reaches back over positions, so it ends in the prompt."""
    position = batch.position_ids
    place = torch.arange(position.shape[1], device=position.device).expand_as(position)
    first = torch.zeros_like(position) if window is None else position - window + 1
    return Token(place, batch.group, batch.segment, position, first)


def attention_mask(batch: PackedBatch, window: int | None = None) -> Tensor:
    """[R, 1, L, L] bool, True where the query (row) sees the key (column), within a sliding `window` if given."""
    everyone = tokens(batch, window)
    queries, keys = Token(*(x[:, :, None] for x in everyone)), Token(*(x[:, None, :] for x in everyone))
    return may_see(queries, keys)[:, None]
