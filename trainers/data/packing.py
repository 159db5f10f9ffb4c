"""Examples to tensors: a prompt and all its completions in one row, rows filled up with further examples.

A row is `[prompt | completion 1 | ... | completion K]`, perhaps followed by other groups. Positions restart at the
prompt's length for every completion; a token sees its group's prompt and its own completion, causally. The last
prompt token's hidden state predicts the first token of *every* completion. What is scored is listed flat
(`hidden_index`, `targets`, `slot`), so that no prompt or padding position ever meets the LM head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .blocks import BlockLists, Blocks, block_lists
from .examples import Example

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
    scored: [C (+ prompts), T] bool. num_completions: C. num_tokens: without padding.
    weights: [C (+ prompts), T] float32, of each scored token, 0 elsewhere; None: all are 1.
    examples: those inside, in the order of their completions. is_filler: see `unscored`.
    blocks: sliding window (None: full attention) -> what FlexAttention computes of the rows; of rows that need no mask,
        or that are packed for another attention, none.
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
    num_completions: int
    num_tokens: int
    examples: tuple[Example, ...]
    is_filler: bool = False
    weights: Tensor | None = None
    blocks: Mapping[int | None, BlockLists] = field(default_factory=dict)

    def to(self, device: torch.device) -> PackedBatch:
        """The same on another device."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        blocks = {window: lists.to(device) for window, lists in self.blocks.items()}
        return dataclasses.replace(self, **moved, blocks=blocks)

    def unscored(self) -> PackedBatch:
        """The same computation with nothing scored, for a process that has run out of examples."""
        none = self.hidden_index[:0]
        scored = torch.zeros_like(self.scored[:, :1])
        return dataclasses.replace(
            self, hidden_index=none, targets=none, slot=none, scored=scored, num_tokens=0, is_filler=True, weights=None
        )

    def unflatten(self, values: Tensor) -> Tensor:
        """[N] scored values into the [paths, T] layout of `scored`, 0 elsewhere, with a graph."""
        out = values.new_zeros(self.scored.numel())
        return out.index_put((self.slot,), values).view(self.scored.shape)


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
    blocks: Blocks | None = None,
) -> list[PackedBatch]:
    """Cut a step's examples into micro-batches of at most `micro_batch_tokens` tokens, padding included.

    Longest first, first fit: the longest example left gives the row length, the others fill rows up. An example is
    never divided between micro-batches; one longer than the budget gets a micro-batch of its own.

    shared: prompts share a row with all their completions, and rows hold as many groups as fit, kept apart by the
    mask. Else every completion has a row of its own behind a copy of its prompt, without a mask.
    scores_prompt: list the prompt's own tokens too, as paths after the completions.
    micro_batch_cost: what a micro-batch costs beside its tokens, in tokens: of `ROW_FILLS` the one that costs least
    is taken.
    blocks: for an attention that skips the blocks nobody sees, so that rows need not be short: a micro-batch is one
    row, padded to whole blocks if it needs a mask, and knows its `blocks`. Of no use where rows are not shared.
    """
    pieces = [_pieces(example, i, shared) for i, example in enumerate(examples)]
    pieces.sort(key=lambda own: -max(p.length for p in own))
    if blocks is not None and shared:
        best = _cut_long(pieces, micro_batch_tokens // blocks.size * blocks.size)
    else:
        cuts = [_cut(pieces, micro_batch_tokens, fill, shared) for fill in ROW_FILLS]
        costs = [sum(len(rows) * _length(rows) + micro_batch_cost for rows in cut) for cut in cuts]
        best = cuts[costs.index(min(costs))]
    return [_build(examples, rows, scores_prompt=scores_prompt, pad_id=pad_id, blocks=blocks) for rows in best]


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
    waiting: list[list[_Piece]], micro_batch_tokens: int, row_fill: float, shared: bool
) -> list[list[list[_Piece]]]:
    """The rows of every micro-batch. waiting: every example's pieces, longest first."""
    batches = []
    while waiting:
        longest = max(p.length for p in waiting[0])
        rows, waiting = _fill(waiting, longest, max(1, micro_batch_tokens // longest), row_fill * longest, shared)
        batches.append(rows)
    return batches


def _cut_long(waiting: list[list[_Piece]], room: int) -> list[list[list[_Piece]]]:
    """The same, one row each."""
    batches = []
    while waiting:
        rows, waiting = _fill(waiting, max(room, waiting[0][0].length), 1, 0, True)
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
    blocks: Blocks | None,
) -> PackedBatch:
    members = sorted({piece.example for row in rows for piece in row})
    counts = [len(examples[i].completions) for i in members]
    num_completions = sum(counts)
    paths = _Paths(
        completion={m: sum(counts[:k]) for k, m in enumerate(members)},
        prompt={m: num_completions + k for k, m in enumerate(members)} if scores_prompt else {},
    )
    plain, length = _is_plain(rows), _length(rows)
    masked = blocks if blocks is not None and not plain else Blocks(1, ())
    length += -length % masked.size
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    # Without a mask a position that starts again would begin a new document. With one, a row may be longer than any
    # of its sequences, and positions beyond these may have no embedding.
    positions = torch.arange(length).repeat(len(rows), 1) * int(plain)
    group = torch.full((len(rows), length), -1, dtype=torch.int64)
    segment = torch.zeros((len(rows), length), dtype=torch.int64)
    for r, row in enumerate(rows):
        at = 0
        for number, piece in enumerate(row):
            example = examples[piece.example]
            group[r, at : at + piece.length] = number
            prompt = range(at, at + len(example.prompt_ids))
            _write(ids[r], positions[r], prompt, example.prompt_ids, 0)
            at = prompt.stop
            for k in piece.completions:
                place = range(at, at + len(example.completions[k].ids))
                _write(ids[r], positions[r], place, example.completions[k].ids, len(prompt))
                segment[r, at : place.stop] = k + 1
                paths.add(piece.example, example, k, r * length, prompt, place)
                at = place.stop

    hidden_index, targets, path, step, weight = (torch.cat(parts) for parts in zip(*paths.scored, strict=True))
    width = int(step.max()) + 1 if len(step) else 1
    slot = path * width + step
    scored = torch.zeros((num_completions + len(paths.prompt)) * width, dtype=torch.bool)
    scored[slot] = True
    weights = None
    if any(c.weights is not None for i in members for c in examples[i].completions):
        weights = torch.zeros(scored.shape, dtype=torch.float32).index_put((slot,), weight).view(-1, width)
    return PackedBatch(
        input_ids=ids,
        position_ids=positions,
        group=group,
        segment=segment,
        plain=plain,
        hidden_index=hidden_index,
        targets=targets,
        slot=slot,
        scored=scored.view(-1, width),
        num_completions=num_completions,
        num_tokens=sum(piece.length for row in rows for piece in row),
        examples=tuple(examples[i] for i in members),
        weights=weights,
        blocks={window: block_lists(group, segment, masked.size, window) for window in masked.windows},
    )


def _write(ids: Tensor, positions: Tensor, place: range, tokens: Sequence[int], first_position: int) -> None:
    ids[place.start : place.stop] = torch.tensor(tokens, dtype=torch.int64)
    positions[place.start : place.stop] = torch.arange(first_position, first_position + len(place))


@dataclass
class _Paths:
    """Collects what is scored, a stretch of tokens at a time.

    completion, prompt: the path of an example's first completion, and of its prompt where prompts are scored.
    scored: (hidden index, target, path, place on the path, weight) of each stretch, tensors of one length.
    """

    completion: dict[int, int]
    prompt: dict[int, int]
    scored: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=list)

    def add(self, index: int, example: Example, k: int, row_start: int, prompt: range, place: range) -> None:
        """Completion k of an example, and with the first one the prompt; the ranges are places in the row."""
        completion = example.completions[k]
        tokens = torch.tensor(completion.ids, dtype=torch.int64)
        keep = torch.ones_like(tokens, dtype=torch.bool)
        if completion.scored is not None:
            keep = torch.tensor(completion.scored, dtype=torch.bool)
        # the first token is predicted by the prompt's last, each later one by the one before it
        before = torch.arange(place.start - 1, place.stop - 1) + row_start
        before[:1] = row_start + prompt.stop - 1
        step = torch.arange(len(tokens))
        weights = None if completion.weights is None else torch.tensor(completion.weights, dtype=torch.float32)[keep]
        self._append(before[keep], tokens[keep], self.completion[index] + k, step[keep], weights)
        if k == 0 and index in self.prompt:
            inside = torch.arange(prompt.start, prompt.stop - 1) + row_start
            self._append(inside, torch.tensor(example.prompt_ids[1:]), self.prompt[index], torch.arange(len(inside)))
            # the end of a prompt that its completions tokenize differently counts as prompt
            self._append(
                before[~keep], tokens[~keep], self.prompt[index], len(inside) + torch.arange(int((~keep).sum()))
            )

    def _append(
        self, hidden_index: Tensor, target: Tensor, path: int, step: Tensor, weights: Tensor | None = None
    ) -> None:
        weights = torch.ones(len(step)) if weights is None else weights
        self.scored.append((hidden_index, target.long(), torch.full_like(step, path), step, weights))
