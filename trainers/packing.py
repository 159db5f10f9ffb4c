"""Examples to tensors: a prompt and all its completions in one row, rows filled up with further examples.

A row is `[prompt | completion 1 | ... | completion K]`, perhaps followed by other groups. Positions restart at the
prompt's length for every completion; a token sees its group's prompt and its own completion, causally. The last
prompt token's hidden state predicts the first token of *every* completion. What is scored is listed flat
(`hidden_index`, `targets`, `slot`), so that no prompt or padding position ever meets the LM head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data import Example


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch. R rows of L tokens; C completions of at most T tokens, then (optionally) one path a prompt.

    input_ids, position_ids: [R, L] int64.
    group, segment: [R, L] int64, which group a token belongs to (-1: padding) and which part of it (0: the prompt,
        k: completion k); see `attention_mask`. plain: causal attention without a mask says the same.
    hidden_index: [N] int64, which of the R * L hidden states predicts each scored token.
    targets: [N] int64, that token. slot: [N] int64, its place in the flattened [C (+ prompts), T] result.
    scored: [C (+ prompts), T] bool. num_completions: C. num_tokens: without padding.
    examples: those inside, in the order of their completions. is_filler: see `unscored`.
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

    def to(self, device: torch.device) -> PackedBatch:
        """The same on another device."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def unscored(self) -> PackedBatch:
        """The same computation with nothing scored, for a process that has run out of examples."""
        none = self.hidden_index[:0]
        scored = torch.zeros_like(self.scored[:, :1])
        return dataclasses.replace(
            self, hidden_index=none, targets=none, slot=none, scored=scored, num_tokens=0, is_filler=True
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
) -> list[PackedBatch]:
    """Cut a step's examples into micro-batches of at most `micro_batch_tokens` tokens, padding included.

    Longest first, first fit: the longest example left gives the row length, the others fill rows up. An example is
    never divided between micro-batches; one longer than the budget gets a micro-batch of its own.

    shared: prompts share a row with all their completions, and rows hold as many groups as fit, kept apart by the
    mask. Else every completion has a row of its own behind a copy of its prompt, without a mask.
    scores_prompt: list the prompt's own tokens too, as paths after the completions.
    """
    order = sorted(range(len(examples)), key=lambda i: (-max(p.length for p in _pieces(examples[i], i, shared)), i))
    batches = []
    while order:
        row_length = max(p.length for p in _pieces(examples[order[0]], order[0], shared))
        rows, order = _fill(examples, order, row_length, max(1, micro_batch_tokens // row_length), shared)
        batches.append(_build(examples, rows, scores_prompt=scores_prompt, pad_id=pad_id))
    return batches


def split_groups(examples: Iterable[Example], micro_batch_tokens: int) -> list[Example]:
    """Divide groups that do not fit one micro-batch; for kinds whose completions stand for themselves (rollouts)."""
    out = []
    for example in examples:
        kept: list[int] = []
        size = len(example.prompt_ids)
        for i, completion in enumerate(example.completions):
            if kept and size + len(completion.ids) > micro_batch_tokens:
                out.append(example.take(kept))
                kept, size = [], len(example.prompt_ids)
            kept.append(i)
            size += len(completion.ids)
        out.append(example.take(kept) if len(kept) < len(example.completions) else example)
    return out


def _pieces(example: Example, index: int, shared: bool) -> list[_Piece]:
    prompt = len(example.prompt_ids)
    lengths = [len(c.ids) for c in example.completions]
    if shared:
        return [_Piece(index, tuple(range(len(lengths))), prompt + sum(lengths))]
    return [_Piece(index, (k,), prompt + n) for k, n in enumerate(lengths)]


def _fill(
    examples: Sequence[Example], order: list[int], row_length: int, max_rows: int, shared: bool
) -> tuple[list[list[_Piece]], list[int]]:
    """Put as many examples as fit into `max_rows` rows; returns the rows and the indices left over."""
    rows: list[list[_Piece]] = []
    room: list[int] = []
    left = []
    for index in order:
        pieces, places = _pieces(examples[index], index, shared), []
        trial = list(room)
        for piece in pieces:
            at = next((r for r, free in enumerate(trial) if free >= piece.length), None)
            if at is None and (len(trial) < max_rows or not rows):
                at = len(trial)
                trial.append(row_length)
            if at is None:
                break
            trial[at] = trial[at] - piece.length if shared else 0
            places.append(at)
        if len(places) < len(pieces):
            left.append(index)
            continue
        room = trial
        rows.extend([] for _ in range(len(room) - len(rows)))
        for piece, at in zip(pieces, places, strict=True):
            rows[at].append(piece)
    return rows, left


def _build(examples: Sequence[Example], rows: list[list[_Piece]], *, scores_prompt: bool, pad_id: int) -> PackedBatch:
    members = sorted({piece.example for row in rows for piece in row})
    first_path, total = {}, 0
    for index in members:
        first_path[index] = total
        total += len(examples[index].completions)
    num_paths = total + (len(members) if scores_prompt else 0)
    length = max(sum(piece.length for piece in row) for row in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    positions = torch.arange(length).repeat(len(rows), 1)
    group = torch.full((len(rows), length), -1, dtype=torch.int64)
    segment = torch.zeros((len(rows), length), dtype=torch.int64)
    # flat lists of (hidden position, target, path, place on the path), a tensor of each per stretch of tokens
    scored: list[tuple[Tensor, Tensor, int, Tensor]] = []

    for r, row in enumerate(rows):
        at = 0
        for number, piece in enumerate(row):
            example = examples[piece.example]
            prompt = torch.tensor(example.prompt_ids)
            group[r, at : at + piece.length] = number
            ids[r, at : at + len(prompt)] = prompt
            positions[r, at : at + len(prompt)] = torch.arange(len(prompt))
            prompt_at, at = r * length + at, at + len(prompt)
            for k in piece.completions:
                completion = example.completions[k]
                target = torch.tensor(completion.ids, dtype=torch.int64)
                n = len(target)
                ids[r, at : at + n] = target
                positions[r, at : at + n] = torch.arange(len(prompt), len(prompt) + n)
                segment[r, at : at + n] = k + 1
                # the first token is predicted by the prompt's last, each later one by the one before it
                before = torch.arange(r * length + at - 1, r * length + at + n - 1)
                before[:1] = prompt_at + len(prompt) - 1
                keep = torch.ones(n, dtype=torch.bool) if completion.scored is None else torch.tensor(completion.scored)
                place = torch.arange(n)
                scored.append((before[keep], target[keep], first_path[piece.example] + k, place[keep]))
                if scores_prompt and k == 0:
                    path = total + members.index(piece.example)
                    inside = torch.arange(prompt_at, prompt_at + len(prompt) - 1)
                    scored.append((inside, prompt[1:], path, torch.arange(len(prompt) - 1)))
                    # a prompt tail that the completions do not share counts as prompt
                    tail = (~keep).sum()
                    scored.append((before[~keep], target[~keep], path, len(prompt) - 1 + torch.arange(tail)))
                at += n

    width = max((int(place[-1]) + 1 for *_, place in scored if len(place)), default=1)
    slot = torch.cat([path * width + place for *_, path, place in scored])
    mask = torch.zeros(num_paths * width, dtype=torch.bool)
    mask[slot] = True
    return PackedBatch(
        input_ids=ids,
        position_ids=positions,
        group=group,
        segment=segment,
        plain=all(len(row) == 1 and len(row[0].completions) == 1 for row in rows),
        hidden_index=torch.cat([before for before, *_ in scored]),
        targets=torch.cat([target for _, target, *_ in scored]),
        slot=slot,
        scored=mask.view(num_paths, width),
        num_completions=total,
        num_tokens=sum(piece.length for row in rows for piece in row),
        examples=tuple(examples[i] for i in members),
    )


def attention_mask(batch: PackedBatch, window: int | None = None) -> Tensor:
    """[R, 1, L, L] bool, True where the query (row) may see the key (column), within a sliding `window` if given.

    Every token sees itself, padding too: a row of a softmax that sees nothing is NaN.
    """
    group, segment, positions = batch.group, batch.segment, batch.position_ids
    index = torch.arange(group.shape[1], device=group.device)
    visible = (segment[:, None, :] == 0) | (segment[:, :, None] == segment[:, None, :])
    allowed = visible & (group[:, :, None] == group[:, None, :]) & (index[:, None] >= index) & (group >= 0)[:, None, :]
    if window is not None:
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    return (allowed | torch.eye(len(index), dtype=torch.bool, device=group.device))[:, None]
