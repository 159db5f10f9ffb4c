"""KTO's mismatched completions: every prompt with a neighbour's, and what the reference says of both at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..batches.packing import PackedBatch, example_tokens
from ..batches.values import per_example
from ..data.examples import Completion, Example
from .reference import Reference, StoredReference, tokens_key


def mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Each prompt with the completion of the example before it (the first with the last's), cut to `max_length`."""
    out = []
    for i, example in enumerate(examples):
        other = examples[i - 1].completions[0]
        room = max(1, max_length - len(example.prompt_ids))
        cut = Completion(other.ids[:room], None if other.scored is None else other.scored[:room])
        out.append(Example(example.prompt_ids, [cut], row=-1))
    return out


def together(example: Example, other: Example, micro_batch_tokens: int) -> list[Example]:
    """A prompt with both completions, or with each where both do not fit a micro-batch."""
    both = dataclasses.replace(example, completions=[*example.completions, *other.completions])
    return [both] if example_tokens(both) <= micro_batch_tokens else [example, other]


def refer_together(reference: Reference, both: Sequence[PackedBatch], batches: Sequence[PackedBatch]) -> list[Tensor]:
    """The reference's log-probs of `batches`, computed of `both`: the same completions, each prompt with all of its."""
    table: dict[str, list[Tensor]] = {}
    for batch in both:
        values = reference(batch)  # of a filler too: processes that share weights compute together
        for example, logps in per_example(batch, values):
            table |= {tokens_key(example.take([k])): [own] for k, own in enumerate(logps)}
    stored = StoredReference(table, reference)
    return [torch.zeros_like(b.scored, dtype=torch.float32) if b.is_filler else stored(b) for b in batches]
