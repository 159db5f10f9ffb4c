"""Hypothesis strategies for batches of log-probabilities: what any loss of this field must bear.

Batches are plain float64 tensors, so they serve any implementation. They are ragged, have holes in their masks, empty
rows, batches of one row and of none scored, labels of one class, log-probs from exactly 0 to -1e4, and ratios from
exactly 1 to exp(+-1e4). Masks, labels and shapes are drawn one by one, so that a failure shrinks to the fewest rows
and tokens; the numbers come from a drawn seed and size.

    @given(batches("paired"))
    def test_padding(batch):
        wider = pad(batch, left=1, right=2, fill=float("nan"))
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

PARTS = {
    "sequence": ("completion",),
    "labeled": ("completion",),
    "grouped": ("completion",),
    "paired": ("chosen", "rejected", "prompt"),
}
"""kind -> what one example of it consists of."""

SIZES = (0.0, 1e-3, 1.0, 30.0, 1e4)
SPREADS = (0.0, 1e-3, 0.3, 1e4)


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of one kind: C examples, T tokens (T differs between parts).

    masks: part -> [C, T] bool, True where scored.
    tokens: role -> part -> [C, T] nats; roles: `policy`, `ref`, `old`, `entropy`. Log-probs are at most 0.
    rows: name -> [C]; `label` bool (labeled), `advantages` (grouped).
    collected: [n] nats, log-ratios of mismatched completions over a whole step (labeled), else empty.
    """

    kind: str
    masks: dict[str, Tensor]
    tokens: dict[str, dict[str, Tensor]]
    rows: dict[str, Tensor]
    collected: Tensor

    def __len__(self) -> int:
        return len(next(iter(self.masks.values())))


@st.composite
def batches(
    draw: st.DrawFn,
    kind: str,
    *,
    max_rows: int = 4,
    max_tokens: int = 5,
    max_size: float = 1e4,
    all_masked: bool = False,
) -> Batch:
    """Batches of a kind with 1 to `max_rows` examples, log-probs and log-ratios up to about `max_size` nats."""
    count = draw(st.integers(1, max_rows), label="rows")
    masks = {}
    for part in PARTS[kind]:
        width = draw(st.integers(1, max_tokens), label=f"{part} tokens")
        bits = st.just(0) if all_masked else st.integers(0, 2**width - 1)
        rows = [[bool(row >> t & 1) for t in range(width)] for row in draw(_lists(bits, count), label=f"{part} mask")]
        masks[part] = torch.tensor(rows)
    size = draw(st.sampled_from([s for s in SIZES if s <= max_size]), label="size of log-probs")
    spread = draw(st.sampled_from([s for s in SPREADS if s <= max_size]), label="size of log-ratios")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16), label="seed"))

    def uniform(shape: Sequence[int]) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    policy = {part: -size * uniform(mask.shape) for part, mask in masks.items()}
    tokens = {"policy": policy, "entropy": {part: 12 * uniform(mask.shape) for part, mask in masks.items()}}
    for role in ("ref", "old"):
        moved = {part: logps + spread * (2 * uniform(logps.shape) - 1) for part, logps in policy.items()}
        tokens[role] = {part: logps.clamp(max=0.0) for part, logps in moved.items()}
    extras: dict[str, Tensor] = {}
    if kind == "labeled":
        extras["label"] = torch.tensor(draw(_lists(st.booleans(), count), label="label"))
    if kind == "grouped":
        extras["advantages"] = 2 * (2 * uniform([count]) - 1) * draw(st.sampled_from([1.0, 0.0]), label="advantages")
    collected = spread * (2 * uniform([count + 1 if kind == "labeled" else 0]) - 1)
    return Batch(kind, masks, tokens, extras, collected)


def _lists(elements: st.SearchStrategy, count: int) -> st.SearchStrategy:
    return st.lists(elements, min_size=count, max_size=count)


@st.composite
def partitions(draw: st.DrawFn, count: int) -> list[list[int]]:
    """The numbers below `count`, shuffled and cut into parts: a step dealt out to micro-batches."""
    order = draw(st.permutations(range(count)))
    cuts = [0, *(i for i in range(1, count) if draw(st.booleans())), count]
    return [list(order[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def take(batch: Batch, rows: Sequence[int]) -> Batch:
    """These examples, in this order; `collected` stays, being of the whole step."""
    at = torch.tensor(rows, dtype=torch.int64)
    return Batch(
        batch.kind,
        {part: mask[at] for part, mask in batch.masks.items()},
        {role: {part: values[at] for part, values in parts.items()} for role, parts in batch.tokens.items()},
        {name: values[at] for name, values in batch.rows.items()},
        batch.collected,
    )


def pad(batch: Batch, *, left: int, right: int, fill: float) -> Batch:
    """The same batch with masked columns added on both sides, and `fill` wherever nothing is scored."""
    masks = {part: torch.nn.functional.pad(mask, (left, right)) for part, mask in batch.masks.items()}

    def padded(part: str, values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (left, right)).masked_fill(~masks[part], fill)

    tokens = {
        role: {part: padded(part, values) for part, values in parts.items()} for role, parts in batch.tokens.items()
    }
    return replace(batch, masks=masks, tokens=tokens)


def convert(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """`change` applied to every floating-point tensor."""
    tokens = {role: {part: change(values) for part, values in parts.items()} for role, parts in batch.tokens.items()}
    rows = {name: change(values) if values.is_floating_point() else values for name, values in batch.rows.items()}
    return replace(batch, tokens=tokens, rows=rows, collected=change(batch.collected))
