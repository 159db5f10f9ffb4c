"""Which keys every stretch of a packed row attends to, for kernels that take sequences of any length.

A sequence of queries is a prompt with the completion right behind it, or one of the completions that follow, or the
padding at a row's end. Its keys are its own tokens, and in front of them, of a completion that follows, those of its
prompt once more: so causal attention in which the last query sees the last key is who sees whom in the row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
VARLEN = "logratio_varlen"
"""transformers' name for the attention that takes them (`attention/varlen.py`)."""
ROW_MULTIPLE = 16
"""A row's length is a multiple of it, for the sake of the matrix products."""


class KeyLists(NamedTuple):
    """The sequences of a micro-batch of T tokens, all rows one after the other, and its T' keys.

    query_ends, key_ends: [sequences + 1] int32, where each begins, and the last ends. longest_query, longest_key: in
    tokens. source: [T'] int32, of which token each key is; None: of each in its place, since no prompt is seen twice.
    copies: [T'] int32, the keys again in the order of their tokens; copies_of: [T + 1] int32, where those of each token
    begin in it.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int
    source: Tensor | None
    copies: Tensor | None
    copies_of: Tensor | None


def key_lists(group: Tensor, segment: Tensor) -> KeyLists:
    """group, segment: [R, L] as in `PackedBatch`, on the CPU. A sliding window is nothing to the lists."""
    groups, segments = group.numpy(), segment.numpy()
    begins = np.ones(groups.shape, bool)
    begins[:, 1:] = (np.diff(groups) != 0) | (np.diff(segments) != 0)
    start = begins.reshape(-1).nonzero()[0]
    stop = np.append(start[1:], groups.size)
    completion = segments.reshape(-1)[start] > 0
    prompt = np.maximum.accumulate(np.where(completion, 0, np.arange(len(start))))
    behind_prompt = completion & (prompt == np.arange(len(start)) - 1)  # they are one sequence
    first = start[~behind_prompt]
    again = (completion & ~behind_prompt)[~behind_prompt]
    prompt = prompt[~behind_prompt]
    lengths = np.diff(np.append(first, groups.size))
    seen = np.where(again, stop[prompt] - start[prompt], 0)
    source, copies, copies_of = None, None, None
    if again.any():
        parts, sizes = (np.stack(x, 1).reshape(-1) for x in ((start[prompt], first), (seen, lengths)))
        tokens = np.repeat(parts - (sizes.cumsum() - sizes), sizes) + np.arange(sizes.sum())
        source, copies = _int32(tokens), _int32(tokens.argsort(kind="stable"))
        copies_of = _ends(np.bincount(tokens, minlength=groups.size))
    longest = int(lengths.max()), int((lengths + seen).max())
    return KeyLists(_ends(lengths), _ends(lengths + seen), *longest, source, copies, copies_of)


def _ends(lengths: Array) -> Tensor:
    return _int32(np.append(0, lengths.cumsum()))


def _int32(values: Array) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))
