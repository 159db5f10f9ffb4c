"""Hypothesis strategies for batches of log-probabilities: what any loss of this field must bear.

Batches are plain float64 tensors, so they serve any implementation. They are ragged, have holes in their masks, empty
rows, batches of one row and of none scored, labels of one class, advantages that are all equal or all 0, log-probs
from exactly 0 to exactly -1e4, and log-ratios from exactly 0 to +-1e4. Masks, labels and shapes are drawn one by one,
so that a failure shrinks to the fewest rows and tokens; the numbers come from a drawn seed and size.

    @given(batches("paired"))
    def test_padding(batch):
        wider = pad(batch, left=1, right=2, fill=float("nan"))
        ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

PARTS = {
    "sequence": ("completion",),
    "labeled": ("completion",),
    "grouped": ("completion",),
    "paired": ("chosen", "rejected", "prompt", "gold"),
    "listed": ("first", "second", "third"),
}
"""kind -> what one example of it consists of; a list may lack its last."""

LOGPS = ("policy", "ref", "old", "behavior")
STATS = ("entropy", "log_z", "log_sum_p2", "is_top1", "divergence")
CONSTANTS = ("log_sum_p2", "is_top1")
"""Those that no model gives a gradient to."""

# In steps of a power of two, so that sums of numbers at their ends are exact, in any order.
SIZES = (0.0, 2.0**-10, 1.0, 30.0, 1e4)
SPREADS = (0.0, 2.0**-10, 0.25, 4.0, 1e4)


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of one kind: C examples, T tokens (T differs between parts).

    masks: part -> [C, T] bool, True where scored.
    tokens: role -> part -> [C, T]; log-probs `policy`, `ref`, `old`, `behavior` (nats, at most 0) and the policy's
        statistics `entropy` (0 to 12 nats), `log_z` (any), `log_sum_p2` (log of the sum over the vocabulary of p^2, -12
        to 0), `is_top1` (bool, whether no token is likelier); for sequences `divergence` (from another model, at least
        0); for sequences and labeled examples perhaps `weights` (at least 0).
    rows: name -> [C]; `label` bool (labeled), `advantages` and `prompts` int64 (grouped), `margin` (paired), `sizes`
        int64 and `rewards` [C, 3] (listed).
    collected: [n] nats, log-ratios of mismatched completions over a whole step (labeled), else empty.
    earlier: steps on this same batch that came before, for losses that carry a state.
    """

    kind: str
    masks: dict[str, Tensor]
    tokens: dict[str, dict[str, Tensor]]
    rows: dict[str, Tensor]
    collected: Tensor
    earlier: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.masks.values())))


@st.composite
def batches(
    draw: st.DrawFn,
    kind: str,
    *,
    min_rows: int = 1,
    max_rows: int = 4,
    max_tokens: int = 5,
    max_size: float = 1e4,
    spreads: Sequence[float] = SPREADS,
    all_masked: bool = False,
    distinct: bool = False,
) -> Batch:
    """Batches of a kind with `min_rows` to `max_rows` examples, log-probs and log-ratios up to about `max_size` nats.

    spreads: what the size of the log-ratios of tokens is drawn from.
    distinct: no two numbers are equal by design, for losses that rank them (where two are equal, the order of the rows
    decides who is first).
    """
    count = draw(st.integers(min_rows, max_rows), label="rows")
    masks = {}
    for part in PARTS[kind]:
        width = draw(st.integers(1, max_tokens), label=f"{part} tokens")
        bits = st.just(0) if all_masked else st.integers(0, 2**width - 1)
        rows = [[bool(row >> t & 1) for t in range(width)] for row in draw(_lists(bits, count), label=f"{part} mask")]
        masks[part] = torch.tensor(rows)
    sizes, some_spreads = (
        [s for s in choices if s <= max_size and (s or not distinct)] for choices in (SIZES, spreads)
    )
    size = draw(st.sampled_from(sizes), label="size of log-probs")
    spread = draw(st.sampled_from(some_spreads), label="size of log-ratios")
    ends = not distinct and draw(st.booleans(), label="only the ends of each range")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16), label="seed"))

    def uniform(shape: Sequence[int]) -> Tensor:
        numbers = torch.rand(shape, generator=generator, dtype=torch.float64)
        return numbers.round() if ends else numbers

    def around_zero(shape: Sequence[int]) -> Tensor:
        return 2 * uniform(shape) - 1

    policy = {part: -size * uniform(mask.shape) for part, mask in masks.items()}
    tokens = {
        "policy": policy,
        "entropy": {part: 12 * uniform(mask.shape) for part, mask in masks.items()},
        "log_z": {part: size * around_zero(mask.shape) for part, mask in masks.items()},
        # one token's p^2 is never more than the sum
        "log_sum_p2": {part: (-12 * uniform(mask.shape)).maximum(2 * policy[part]) for part, mask in masks.items()},
    }

    tokens["is_top1"] = {
        part: (policy[part] >= p2) | (policy[part] > -math.log(2)) for part, p2 in tokens["log_sum_p2"].items()
    }

    def near(logps: Tensor) -> Tensor:
        return (logps + spread * around_zero(logps.shape)).clamp(max=0.0)

    for role in ("ref", "old"):
        tokens[role] = {part: near(logps) for part, logps in policy.items()}
    if kind == "sequence" and draw(st.booleans(), label="weights"):
        tokens["weights"] = {part: (3 * uniform(mask.shape) - 1).clamp(min=0) for part, mask in masks.items()}
    if kind == "labeled" and draw(st.booleans(), label="weights"):
        of_row = (3 * uniform([count, 1]) - 1).clamp(min=0)
        tokens["weights"] = {part: of_row.expand(mask.shape).clone() for part, mask in masks.items()}
    extras: dict[str, Tensor] = {}
    if kind == "labeled":
        labels = st.one_of(_lists(st.booleans(), count), *(st.just([one] * count) for one in (False, True)))
        extras["label"] = torch.tensor(draw(labels, label="label"))
    if kind == "grouped":
        alike = draw(st.sampled_from(["zero", "equal", "different", "different"]), label="advantages")
        values = 2 * around_zero([1 if alike == "equal" else count]).expand(count).clone()
        extras["advantages"] = torch.zeros_like(values) if alike == "zero" else values
        extras["prompts"] = torch.arange(count) // 2  # two completions each, perhaps one of the last
    if kind == "paired":
        extras["margin"] = 4 * around_zero([count])
    if kind == "listed":
        extras["sizes"] = torch.tensor(draw(_lists(st.integers(2, 3), count), label="sizes"))
        grades = st.sampled_from([0.0, 0.25, 1.0, 1e4])  # some are equal, and some far from each other
        extras["rewards"] = draw(grades, label="size of rewards") * around_zero([count, 3])
    collected = spread * around_zero([count + 1 if kind == "labeled" else 0])
    tokens["behavior"] = {part: near(logps) for part, logps in tokens["old"].items()}
    if kind == "sequence":
        tokens["divergence"] = {part: size * uniform(mask.shape) for part, mask in masks.items()}
    return Batch(kind, masks, tokens, extras, collected, draw(st.integers(0, 2), label="earlier steps"))


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
    return replace(
        batch,
        masks={part: mask[at] for part, mask in batch.masks.items()},
        tokens={role: {part: values[at] for part, values in parts.items()} for role, parts in batch.tokens.items()},
        rows={name: values[at] for name, values in batch.rows.items()},
    )


def pad(batch: Batch, *, left: int, right: int, fill: float) -> Batch:
    """The same batch with masked columns added on both sides, and `fill` wherever nothing is scored."""
    masks = {part: torch.nn.functional.pad(mask, (left, right)) for part, mask in batch.masks.items()}

    def padded(part: str, values: Tensor) -> Tensor:
        put = fill if values.is_floating_point() else fill < 0
        return torch.nn.functional.pad(values, (left, right)).masked_fill(~masks[part], put)

    tokens = {
        role: {part: padded(part, values) for part, values in parts.items()} for role, parts in batch.tokens.items()
    }
    return replace(batch, masks=masks, tokens=tokens)


def convert(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """`change` applied to every floating-point tensor."""

    def changed(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: change(x) if x.is_floating_point() else x for name, x in values.items()}

    tokens, rows = {role: changed(parts) for role, parts in batch.tokens.items()}, changed(batch.rows)
    return replace(batch, tokens=tokens, rows=rows, collected=change(batch.collected))
