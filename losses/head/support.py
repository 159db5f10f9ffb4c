"""The words that each token was sampled from, where top-k, top-p or min-p left some of the vocabulary out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OUTSIDE = -1e30
"""The logit of a word that is left out: adds exactly 0 to every sum, is less than any other, and makes no NaN."""


class Support(NamedTuple):
    """Of N tokens: that of token t is ids[offsets[t] : offsets[t + 1]], in any order; of one without ids, every word.

    ids: [M] int32 or int64. offsets: [N + 1] int64, from 0 to M. A list and not a bit for each word: of 50 words it is
    200 bytes a token in int32, where a bit each of 151,936 is 19 KB; at V / 32 words they are equal. Offsets are
    read on the CPU: there, no GPU is waited for.
    """

    ids: Tensor
    offsets: Tensor

    @staticmethod
    def of(kept: Tensor) -> Support:
        """From kept [N, V] bool: what a sampler has, as the scores that its filters did not set to -inf."""
        counts = kept.sum(-1) * ~kept.all(-1)
        ids = (kept & (counts > 0)[:, None]).nonzero()[:, 1]
        return Support(ids.to(torch.int32), _offsets(counts))

    @staticmethod
    def whole(tokens: int) -> Support:
        """Of tokens that were sampled from the whole vocabulary."""
        return Support(torch.zeros(0, dtype=torch.int32), torch.zeros(tokens + 1, dtype=torch.int64))

    @staticmethod
    def cat(parts: Sequence[Support]) -> Support:
        """Of all their tokens, one part's after the other's."""
        return Support(torch.cat([p.ids for p in parts]), _offsets(torch.cat([p.offsets.diff() for p in parts])))

    def take(self, tokens: Tensor) -> Support:
        """Of these tokens [K] int64, in this order."""
        counts = self.offsets.diff()[tokens]
        offsets = _offsets(counts)
        first = (self.offsets[tokens] - offsets[:-1]).repeat_interleave(counts)
        return Support(self.ids[first + torch.arange(len(first), device=first.device)], offsets)

    def split(self, tokens: Sequence[int]) -> list[Support]:
        """Of so many tokens each, one after the other: the inverse of `cat`."""
        parts = self.offsets.diff().split(list(tokens))
        ids = self.ids.split([int(counts.sum()) for counts in parts])
        return [Support(own, _offsets(counts)) for own, counts in zip(ids, parts, strict=True)]

    def to(self, device: torch.device) -> Support:
        """The same on another device."""
        return Support(self.ids.to(device), self.offsets.to(device))


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _there(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, which waits for nothing that it is still doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Kept(NamedTuple):
    """A checked `Support` as tiles read it: token [M] and word [M] of each id, int64, tokens in order.

    limited: [N] bool, tokens that have ids. ends: `offsets` on the CPU, so that a slice of them waits for no device.
    """

    token: Tensor
    word: Tensor
    limited: Tensor
    ends: Tensor

    def at(self, tokens: slice) -> Kept:
        """That of consecutive tokens, counted from the first of them."""
        ends = self.ends[tokens.start : tokens.stop + 1]
        ids = slice(int(ends[0]), int(ends[-1]))
        return Kept(self.token[ids] - tokens.start, self.word[ids], self.limited[tokens], ends - ends[0])

    def leave_out(self, z: Tensor, value: float) -> None:
        """Write `value` over the words of z [n, V] that are not in the support."""
        if not len(self.word):
            return
        kept = z[self.token, self.word]
        if bool(self.ends.diff().all()):
            z.fill_(value)
        else:
            z.masked_fill_(self.limited[:, None], value)
        z[self.token, self.word] = kept

    def outside(self, words: int) -> Tensor:
        """[N, V] bool, what is not in the support."""
        outside = self.limited[:, None].repeat(1, words)
        outside[self.token, self.word] = False
        return outside

    def narrowed(
        self, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Kept, Tensor, Tensor | None, Tensor]:
        """(support, weight, bias, targets) over the words that any token kept, where these are 3/4 of all at most.

        Nothing of the other words is in the result or has a gradient, so the products need not have them.
        """
        if not bool(self.ends.diff().all()):
            return self, weight, bias, targets
        used = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        used[self.word] = True
        words = used.nonzero()[:, 0]
        if 4 * len(words) > 3 * len(weight):
            return self, weight, bias, targets
        place = used.cumsum(0) - 1
        bias = None if bias is None else bias.index_select(0, words)
        return self._replace(word=place[self.word]), weight.index_select(0, words), bias, place[targets]


def checked(support: Support, targets: Tensor, words: int) -> Kept | None:
    """The support of targets [N] among V words; None where it is every word for all. See `linear_logps` for errors."""
    ids, offsets = support
    if ids.ndim != 1 or offsets.ndim != 1 or len(offsets) != len(targets) + 1:
        raise ValueError(
            f"support must have ids [M] and offsets [N + 1] for targets [{len(targets)}], "
            f"got ids {list(ids.shape)}, offsets {list(offsets.shape)}"
        )
    if ids.dtype not in (torch.int32, torch.int64) or offsets.dtype != torch.int64:
        raise TypeError(
            "support must have ids in torch.int32 or torch.int64 and offsets in torch.int64, "
            f"got {ids.dtype} and {offsets.dtype}"
        )
    ends = offsets.cpu()
    if ends[0] != 0 or ends[-1] != len(ids) or bool((ends.diff() < 0).any()):
        raise ValueError(f"the support's offsets must rise from 0 to {len(ids)}, the number of its ids")
    if not len(ids):
        return None
    if ids.device.type == "cpu" and (int(ids.min()) < 0 or int(ids.max()) >= words):
        raise ValueError(f"the support's ids must be in [0, {words}), got values from {ids.min()} to {ids.max()}")
    counts = _there(ends.diff(), targets.device)
    token = torch.arange(len(targets), device=counts.device).repeat_interleave(counts, output_size=len(ids))
    word, limited = ids.to(targets.device, torch.int64), counts > 0
    missing = limited.clone()
    missing[token[word == targets[token]]] = False
    if targets.device.type != "cpu":
        torch._assert_async(~missing.any())
    elif missing.any():
        row = int(missing.nonzero()[0, 0])
        raise ValueError(f"the target {targets[row]} of row {row} is not in its support of {counts[row]} words")
    return Kept(token, word, limited, ends)
