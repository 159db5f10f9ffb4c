"""Which blocks of a packed row FlexAttention computes, from where prompts and completions lie, not pair by pair.

A token's keys are two stretches: its group's prompt, and its own completion up to itself; a sliding window cuts both
off at the left. So what a stretch sees of another is a rectangle between two diagonals, and how many pairs of it lie in
a block has a closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


class Blocks(NamedTuple):
    """What a policy with FlexAttention asks of packing. size: of a block, in tokens. windows: of its layers' sliding
    windows, None for full attention."""

    size: int
    windows: tuple[int | None, ...] = (None,)

    def lists(self, group: Tensor, segment: Tensor) -> Mapping[int | None, BlockLists]:
        """Those that `PackedBatch.blocks` has."""
        return {window: block_lists(group, segment, self.size, window) for window in self.windows}


class BlockLists(NamedTuple):
    """Of every block of queries the blocks of keys that it sees, in part or (full) in whole, and the other way round.

    num_blocks: [R, 1, B]. indices: [R, 1, B, B], in order, as many as `num_blocks` says, then zeros. All int32, named
    as `BlockMask` has them.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


def block_lists(group: Tensor, segment: Tensor, size: int, window: int | None = None) -> BlockLists:
    """Those of `masks.attention_mask`. group, segment: [R, L] as in `PackedBatch`, on the CPU."""
    rows, length = group.shape
    across = -(-length // size)
    seen = _Sights.of(group.numpy(), segment.numpy(), window).per_block(size)
    blocks = seen.row * across + seen.query_block
    pairs = np.bincount(blocks * across + seen.key_block, seen.pairs, minlength=rows * across**2)
    pairs = pairs.reshape(rows, across, across)
    whole = pairs == size**2
    part = (pairs > 0) & ~whole
    ways = (part, whole, part.swapaxes(1, 2), whole.swapaxes(1, 2))
    return BlockLists(*(listed for way in ways for listed in _listed(way)))


def _listed(some: Array) -> tuple[Tensor, Tensor]:
    """[R, B, B] bool -> how many are true in each [R, B], and which."""
    rows, across, _ = some.shape
    counts = some.sum(-1, dtype=np.int32)
    row, block, which = some.nonzero()
    ends = counts.reshape(-1).cumsum()
    rank = np.arange(len(which)) - np.repeat(ends - counts.reshape(-1), counts.reshape(-1))
    indices = np.zeros((rows, across, across), np.int32)
    indices[row, block, rank] = which
    return torch.from_numpy(counts)[:, None], torch.from_numpy(indices)[:, None]


class _PerBlock(NamedTuple):
    row: Array
    query_block: Array
    key_block: Array
    pairs: Array


class _Sights(NamedTuple):
    """What queries q of a stretch [start, stop) see of keys k in another: those with q + low <= k <= q + high."""

    row: Array
    start: Array
    stop: Array
    key_start: Array
    key_stop: Array
    low: Array
    high: Array

    @classmethod
    def of(cls, group: Array, segment: Array, window: int | None) -> _Sights:
        rows, length = group.shape
        begins = np.ones((rows, length), bool)
        begins[:, 1:] = (np.diff(group) != 0) | (np.diff(segment) != 0)
        at = begins.reshape(-1).nonzero()[0]
        row, start = at // length, at % length
        stop = np.append(at[1:], rows * length) - row * length
        padding, completion = group.reshape(-1)[at] < 0, segment.reshape(-1)[at] > 0
        prompt = np.maximum.accumulate(np.where(completion, 0, np.arange(len(at))))
        far = 2 * length
        reach = far if window is None else window - 1
        own_low = np.where(padding, 0, -reach)  # padding sees itself alone
        to_self = cls(row, start, stop, start, stop, own_low, np.zeros_like(start))
        # a completion's positions go on where its prompt ends, which may lie far in front of it
        gap = start - stop[prompt]
        to_prompt = cls(row, start, stop, start[prompt], stop[prompt], -reach - gap, np.full_like(start, far))
        return cls(*(np.concatenate([a, b[completion]]) for a, b in zip(to_self, to_prompt, strict=True)))

    def per_block(self, size: int) -> _PerBlock:
        """Pairs of tokens in every block that one of them touches."""
        first_query, first_key = self.start // size, self.key_start // size
        keys = (self.key_stop - 1) // size + 1 - first_key
        touched = ((self.stop - 1) // size + 1 - first_query) * keys
        of = np.repeat(np.arange(len(touched)), touched)
        number = np.arange(len(of)) - np.repeat(touched.cumsum() - touched, touched)
        query_block, key_block = first_query[of] + number // keys[of], first_key[of] + number % keys[of]
        start, stop = (
            np.maximum(self.start[of], query_block * size),
            np.minimum(self.stop[of], (query_block + 1) * size),
        )
        key_start = np.maximum(self.key_start[of], key_block * size)
        key_stop = np.minimum(self.key_stop[of], (key_block + 1) * size)
        pairs = _up_to(start, stop, key_start, key_stop, self.high[of])
        pairs -= _up_to(start, stop, key_start, key_stop, self.low[of] - 1)
        return _PerBlock(self.row[of], query_block, key_block, pairs)


def _up_to(start: Array, stop: Array, key_start: Array, key_stop: Array, offset: Array) -> Array:
    """How many pairs have k <= q + offset: the sum over q of q + offset + 1 - key_start, between 0 and all keys."""
    first, last = start + offset + 1 - key_start, stop + offset + 1 - key_start
    return _ramp(last) - _ramp(first) - _ramp(last - (key_stop - key_start)) + _ramp(first - (key_stop - key_start))


def _ramp(x: Array) -> Array:
    """The sum of all n with 0 <= n < x."""
    x = np.maximum(x, 0)
    return x * (x - 1) // 2
