"""Keys and values of many rows, each of a length of its own, written in place.

transformers' dynamic cache copies all that it holds for every token, and pads shorter rows on the left; here a row
begins at the left, a token is written behind its own last one, and what is beyond it is masked. A row that has ended
gives its place to the last one, and another may enter behind that, whatever the lengths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

GROWTH = 1.5
STEP = 32  # tokens; room is made in multiples of it


class SlotLayer(DynamicLayer):
    """One layer's. rows: [S, heads, room, D], of which `cache.rows` are in use, each up to its length."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the token of each row, [R, heads, 1, D], where `SlotCache.begin` said, and return all that is seen."""
        assert self.keys is not None and self.values is not None
        index, place = self.cache.at
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held[index, :, place] = new[:, :, 0].to(held.dtype)
        keys, values = (x[: len(index), :, : self.cache.seen].to(key_states.dtype) for x in (self.keys, self.values))
        return keys, values

    def get_seq_length(self) -> int:
        return self.cache.longest


class SlotCache(Cache):
    """slots: rows at most. A pass over tokens lies between `begin` and `end`, which move lengths on once for all
    layers, on the device alone; `longest` is the host's.

    at_once: bytes that may be taken for tokens that rows do not have yet. most: tokens that a row will ever have, 0:
    nobody knows. Both say how much room is made at a time, and nothing else.
    """

    def __init__(self, slots: int, device: torch.device, *, at_once: int = 0) -> None:
        super().__init__(layers=[])
        self.slots, self.rows, self.room = slots, 0, 0
        self.at_once, self.most = at_once, 0
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.used = torch.zeros_like(self.lengths)
        self.index = torch.arange(slots, device=device)
        self.longest = self.seen = 0

    def begin(self, rows: int, seen: int) -> Tensor:
        """The first `rows` rows, in use or not, get a token each, and see `seen` places. Returns the place of it, [R]:
        behind a row's last one, or the first of a row that is not in use."""
        place = self.lengths[:rows]
        self.at, self.seen = (self.index[:rows], place), seen
        return place

    def end(self) -> None:
        """They have it."""
        index, place = self.at
        self.lengths[: len(index)] = place + self.used[: len(index)]

    def clear(self) -> None:
        """No row is in use; room stays."""
        self._count(0)

    def enter(self, prompts: DynamicCache, which: Tensor, lengths: Tensor) -> None:
        """New rows behind those in use. prompts: what was kept of prompts, padded on the right. which: [n], the prompt
        of each new row, of `lengths` tokens, [n]."""
        new = slice(self.rows, self.rows + len(which))
        self.lengths[new] = lengths
        self._count(new.stop)
        self.make_room(self.longest + STEP, prompts)  # else the first token would make more
        runs, counts = which.unique_consecutive(return_counts=True)
        starts = [self.rows - len(which), *(self.rows - len(which) + counts.cumsum(0)).tolist()]
        for held, kept in zip(tensors(self), tensors(prompts), strict=True):
            width = min(kept.shape[2], held.shape[2])
            for prompt, start, stop in zip(runs.tolist(), starts, starts[1:], strict=False):
                held[start:stop, :, :width] = kept[prompt, :, :width]  # without a copy on the way

    def leave(self, rows: list[int]) -> list[int]:
        """Free these rows, and move others into their places: which of the old ones is at each place now."""
        left = set(rows)
        order = list(range(self.rows))
        holes = sorted(left)
        for hole in holes:
            while order and order[-1] in left:
                order.pop()
            if hole >= len(order):
                break
            last = order.pop()
            order[hole] = last
            torch._foreach_copy_([held[hole] for held in tensors(self)], [held[last] for held in tensors(self)])
            self.lengths[hole] = self.lengths[last]
        self._count(len(order))
        return order

    def _count(self, rows: int) -> None:
        self.rows = rows
        self.used[:rows], self.used[rows:] = 1, 0
        self.lengths[rows:] = 0
        self.longest = int(self.lengths[:rows].max()) if rows else 0

    def make_room(self, tokens: int, like: DynamicCache | None = None) -> None:
        """For so many tokens a row; like: of whose layers' shapes they are at first."""
        if not self.layers and like is not None:
            self.layers = [SlotLayer(self) for _ in like.layers]
            self._hold([x.new_zeros(self.slots, x.shape[1], 0, x.shape[3]) for x in tensors(like)])
        if tokens <= self.room:
            return
        wished = max(self.room * GROWTH, self.at_once // self.token_bytes)
        self.room = -(-int(max(tokens, min(wished, self.most) if self.most else wished)) // STEP) * STEP
        wider = []
        for old in tensors(self):
            wide = old.new_zeros(*old.shape[:2], self.room, old.shape[3])
            wide[: self.rows, :, : old.shape[2]] = old[: self.rows]
            wider.append(wide)
        self._hold(wider)

    @property
    def token_bytes(self) -> int:
        """Of a token in every slot."""
        return sum(x.shape[0] * x.shape[1] * x.shape[3] * x.element_size() for x in tensors(self))

    def _hold(self, new: list[Tensor]) -> None:
        """These as the layers' keys and values, in the order of `tensors`."""
        for layer, keys, values in zip(self.layers, new[::2], new[1::2], strict=True):
            assert isinstance(layer, SlotLayer)
            layer.keys, layer.values, layer.is_initialized = keys, values, True


def tensors(cache: Cache) -> list[Tensor]:
    """Keys and values of one layer after the other."""
    layers: list[Any] = cache.layers
    return [x for layer in layers for x in (layer.keys, layer.values)]
