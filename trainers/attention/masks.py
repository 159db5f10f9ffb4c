"""Who sees whom in a packed batch, as a dense mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batches.packing import PackedBatch


class Sight(NamedTuple):
    """What a token sees of its row: the places from `own` up to itself, of its own completion (or prompt), and those
    from `prompt` up to, without, `end`, of the prompt in front of its completion. Of many tokens, tensors."""

    own: Any
    prompt: Any
    end: Any


def may_see(query: Any, key: Any, sight: Sight) -> Tensor:
    """Whether the token at the place `query`, with this sight, sees the one at `key` in its row.

    Every token sees itself, padding too: a row of a softmax that sees nothing is NaN.
    """
    return ((key >= sight.own) & (key <= query)) | ((key >= sight.prompt) & (key < sight.end))


def sights(batch: PackedBatch, window: int | None = None) -> Sight:
    """Those of all tokens, [R, L] int32. A window reaches back over positions, so it ends in the prompt."""
    position, segment = batch.position_ids, batch.segment
    place = torch.arange(position.shape[1], device=position.device).expand_as(position)
    begins = torch.ones_like(segment, dtype=torch.bool)
    begins[:, 1:] = (batch.group.diff(dim=1) != 0) | (segment.diff(dim=1) != 0)
    own = torch.where(begins, place, 0).cummax(1).values
    prompt = torch.where(begins & (segment == 0), place, 0).cummax(1).values
    end = prompt + position - (place - own)  # a completion's positions go on where its prompt ends; a prompt's own: 0
    padding = batch.group < 0  # sees itself alone
    own, end = torch.where(padding, place, own), torch.where(padding, prompt, end)
    if window is not None:
        own = own.maximum(place - window + 1)
        prompt = prompt.maximum(prompt + position - window + 1)
    return Sight(own.int(), prompt.int(), end.int())


def attention_mask(batch: PackedBatch, window: int | None = None) -> Tensor:
    """[R, 1, L, L] bool, True where the query (row) sees the key (column), within a sliding `window` if given."""
    place = torch.arange(batch.group.shape[1], device=batch.group.device)
    return may_see(place[:, None], place, Sight(*(x[:, :, None] for x in sights(batch, window))))[:, None]
