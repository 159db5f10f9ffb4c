"""Examples to tensors: a prompt and all its completions in one row, rows filled up with further examples.

A row is `[prompt | completion 1 | ... | completion K]`, perhaps followed by other groups. Positions restart at the
prompt's length for every completion; a token sees its group's prompt and its own completion, causally. The last
prompt token's hidden state predicts the first token of *every* completion. What is scored is listed flat
(`hidden_index`, `targets`, `slot`), so that no prompt or padding position ever meets the LM head.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logratio.losses import Support

from ..data.examples import Completion, Example
from .layout import Layout
from .sequences import ROW_MULTIPLE, KeyLists, key_lists

# A row is begun by an example that fills this much of it at least; shorter ones fill rows up, or wait for a micro-batch
# of shorter rows. More makes less padding, less makes fewer micro-batches.
ROW_FILLS = (0.8, 0.5, 0.0)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch. R rows of L tokens; C completions of at most T tokens, then (optionally) one path a prompt.

    input_ids, position_ids: [R, L] int64.
    group, segment: [R, L] int64, which group a token belongs to (-1: padding) and which part of it (0: the prompt,
        k: completion k); see `masks.may_see`. plain: causal attention without a mask says the same.
    hidden_index: [N] int64, which of the R * L hidden states predicts each scored token.
    targets: [N] int64, that token. slot: [N] int64, its place in the flattened [C (+ prompts), T] result.
    scored: [C (+ prompts), T] bool.
    weights: [C (+ prompts), T] float32, of each scored token, 0 elsewhere; None: all are 1.
    support: of the N scored tokens, the words that they were sampled from; None: all.
    examples: those inside, in the order of their completions. is_filler: see `unscored`.
    sequences: those of the rows; None of rows that need no mask, or that are packed for another attention.
    """

    input_ids: Tensor
    position_ids: Tensor
    group: Tensor
    segment: Tensor
    plain: bool
    hidden_index: Tensor
    targets: Tensor
    slot: Tensor
    scored: Tensor
    examples: tuple[Example, ...]
    is_filler: bool = False
    weights: Tensor | None = None
    support: Support | None = None
    sequences: KeyLists | None = None

    @property
    def completions(self) -> list[Completion]:
        """The C of them, of the examples in turn."""
        return [completion for example in self.examples for completion in example.completions]

    @property
    def num_tokens(self) -> int:
        """Without padding; 0 of a filler."""
        return 0 if self.is_filler else int((self.group >= 0).sum())

    def to(self, device: torch.device) -> PackedBatch:
        """The same on another device."""
        moved: dict[str, Any] = {
            f.name: to_device(value, device)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        support = self.support and Support(to_device(self.support.ids, device), self.support.offsets)
        sequences = None if self.sequences is None else lists_to(self.sequences, device)
        return dataclasses.replace(self, **moved, support=support, sequences=sequences)

    def unscored(self) -> PackedBatch:
        """The same computation with nothing scored, for a process that has run out of examples."""
        none = self.hidden_index[:0]
        scored = torch.zeros_like(self.scored[:, :1])
        return dataclasses.replace(
            self,
            hidden_index=none,
            targets=none,
            slot=none,
            scored=scored,
            is_filler=True,
            weights=None,
            support=None,
        )

    def unflatten(self, values: Tensor) -> Tensor:
        """[N] scored values into the [paths, T] layout of `scored`, 0 elsewhere, with a graph."""
        out = values.new_zeros(self.scored.numel())
        return out.index_put((self.slot,), values).view(self.scored.shape)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy there, which waits for nothing that the device is still doing."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def lists_to(lists: KeyLists, device: torch.device) -> KeyLists:
    """The same there."""
    moved: dict[str, Any] = {name: to_device(x, device) for name, x in lists._asdict().items() if isinstance(x, Tensor)}
    return lists._replace(**moved)


@dataclass(frozen=True)
class _Piece:
    """Part of an example that lies contiguously in one row: the prompt and these completions."""

    example: int
    completions: tuple[int, ...]
    length: int


def example_tokens(example: Example, shared: bool = True) -> int:
    """Tokens that an example takes up in a micro-batch."""
    completions = sum(len(c.ids) for c in example.completions)
    return completions + len(example.prompt_ids) * (1 if shared else len(example.completions))


def pack(
    examples: Sequence[Example],
    micro_batch_tokens: int,
    *,
    shared: bool = True,
    scores_prompt: bool = False,
    pad_id: int = 0,
    micro_batch_cost: int = 0,
    sequences: bool = False,
) -> list[PackedBatch]:
    """Cut a step's examples into micro-batches of at most `micro_batch_tokens` tokens, padding included.

    Longest first, first fit: the longest example left gives the row length, the others fill rows up. An example is
    never divided between micro-batches; one longer than the budget gets a micro-batch of its own.

    shared: prompts share a row with all their completions, and rows hold as many groups as fit, kept apart by the
    mask. Else every completion has a row of its own behind a copy of its prompt, without a mask.
    scores_prompt: list the prompt's own tokens too, as paths after the completions.
    micro_batch_cost: what a micro-batch costs beside its tokens, in tokens: of `ROW_FILLS` the one that costs least
    is taken.
    sequences: for an attention that skips what nobody sees, so that rows need not be short: a micro-batch is one row,
    padded to `ROW_MULTIPLE` if it needs a mask, and knows its `sequences`. Of no use where rows are not shared.
    """
    pieces = [_pieces(example, i, shared) for i, example in enumerate(examples)]
    pieces.sort(key=lambda own: -max(p.length for p in own))
    if sequences and shared:
        best = _cut(pieces, micro_batch_tokens // ROW_MULTIPLE * ROW_MULTIPLE, 0, True, one_row=True)
    else:
        cuts = [_cut(pieces, micro_batch_tokens, fill, shared) for fill in ROW_FILLS]
        costs = [sum(len(rows) * _length(rows) + micro_batch_cost for rows in cut) for cut in cuts]
        best = cuts[costs.index(min(costs))]
    return [_build(examples, rows, scores_prompt=scores_prompt, pad_id=pad_id, sequences=sequences) for rows in best]


def split_groups(examples: Iterable[Example], micro_batch_tokens: int, shared: bool = True) -> list[Example]:
    """Divide groups that do not fit one micro-batch; for kinds whose completions stand for themselves (rollouts)."""

    def size(example: Example, kept: Sequence[int]) -> int:
        lengths = [len(example.completions[i].ids) for i in kept]
        prompt = len(example.prompt_ids)
        return prompt + sum(lengths) if shared else len(kept) * (prompt + max(lengths))

    out = []
    for example in examples:
        kept: list[int] = []
        for i in range(len(example.completions)):
            if kept and size(example, [*kept, i]) > micro_batch_tokens:
                out.append(example.take(kept))
                kept = []
            kept.append(i)
        out.append(example.take(kept) if len(kept) < len(example.completions) else example)
    return out


def _pieces(example: Example, index: int, shared: bool) -> list[_Piece]:
    prompt = len(example.prompt_ids)
    lengths = [len(c.ids) for c in example.completions]
    if shared:
        return [_Piece(index, tuple(range(len(lengths))), prompt + sum(lengths))]
    return [_Piece(index, (k,), prompt + n) for k, n in enumerate(lengths)]


def _cut(
    waiting: list[list[_Piece]], micro_batch_tokens: int, row_fill: float, shared: bool, *, one_row: bool = False
) -> list[list[list[_Piece]]]:
    """The rows of every micro-batch. waiting: every example's pieces, longest first. one_row: of all its tokens."""
    batches = []
    while waiting:
        length = max(p.length for p in waiting[0])
        if one_row:
            length = max(length, micro_batch_tokens)
        rows, waiting = _fill(waiting, length, max(1, micro_batch_tokens // length), row_fill * length, shared)
        batches.append(rows)
    return batches


def _is_plain(rows: list[list[_Piece]]) -> bool:
    return all(len(row) == 1 and len(row[0].completions) == 1 for row in rows)


def _length(rows: list[list[_Piece]]) -> int:
    return max(sum(p.length for p in row) for row in rows)


def _fill(
    waiting: list[list[_Piece]], row_length: int, max_rows: int, begins_row: float, shared: bool
) -> tuple[list[list[_Piece]], list[list[_Piece]]]:
    """Put as many examples as fit into `max_rows` rows, which pieces of at least `begins_row` tokens begin; returns
    the rows, and the examples left over."""
    rows: list[list[_Piece]] = []
    room: list[int] = []
    left = []
    for pieces in waiting:
        places: list[int] = []
        trial = list(room)
        for piece in pieces:
            at = next((r for r, free in enumerate(trial) if free >= piece.length), None)
            full_enough = piece.length >= begins_row
            if at is None and (not rows or (len(trial) < max_rows and full_enough)):
                at = len(trial)
                trial.append(row_length)
            if at is None:
                break
            trial[at] = trial[at] - piece.length if shared else 0
            places.append(at)
        if len(places) < len(pieces):
            left.append(pieces)
            continue
        room = trial
        rows.extend([] for _ in range(len(room) - len(rows)))
        for piece, at in zip(pieces, places, strict=True):
            rows[at].append(piece)
    return rows, left


def _build(
    examples: Sequence[Example],
    rows: list[list[_Piece]],
    *,
    scores_prompt: bool,
    pad_id: int,
    sequences: bool,
) -> PackedBatch:
    members = sorted({piece.example for row in rows for piece in row})
    starts = itertools.accumulate((len(examples[i].completions) for i in members), initial=0)
    *paths, num_completions = starts
    path = dict(zip(members, paths, strict=True))
    prompt_path = {m: num_completions + k for k, m in enumerate(members)} if scores_prompt else {}
    plain, length = _is_plain(rows), _length(rows)
    listed = sequences and not plain
    length += -length % (ROW_MULTIPLE if listed else 1)
    layout = Layout(len(rows), length)
    for r, row in enumerate(rows):
        place = r * length
        for number, piece in enumerate(row):
            i = piece.example
            place = layout.lay(examples[i], piece.completions, place, number, path[i], prompt_path.get(i))
    tensors: dict[str, Any] = {
        **layout.rows(pad_id, plain),
        **layout.scored(num_completions + len(prompt_path)),
    }
    return PackedBatch(
        **tensors,
        plain=plain,
        examples=tuple(examples[i] for i in members),
        sequences=key_lists(tensors["group"], tensors["segment"]) if listed else None,
    )
