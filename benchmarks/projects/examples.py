"""The batches on which other projects' losses are held to a law: the same for every project, so that numbers compare.

`check_loss` draws its batches, and finds the smallest that breaks a law; what it draws depends on the machine. These
are few, fixed and ordinary first, so that a law is broken by the most ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from logratio.reference.strategies import LOGPS, PARTS, Batch

LENGTHS = {"completion": (1, 4, 3), "chosen": (1, 4, 3), "rejected": (3, 2, 5), "prompt": (2, 3, 1), "gold": (2, 2, 2)}
ADVANTAGES = (1.0, -0.5, 0.75)


def batch_of(kind: str, size: float = 2.0, spread: float = 0.25, seed: int = 0) -> Batch:
    """Three examples of uneven length. size: of log-probs (nats). spread: of log-ratios."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: Sequence[int]) -> Tensor:
        # whole 1/64, the same on every machine
        return torch.randint(1, 64, list(shape), generator=generator).double() / 64

    masks = {part: _first(LENGTHS[part]) for part in PARTS[kind]}
    policy = {part: -size * uniform(mask.shape) for part, mask in masks.items()}
    tokens: dict[str, dict[str, Tensor]] = {"policy": policy}
    for role in LOGPS[1:]:
        tokens[role] = {part: (x + spread * (2 * uniform(x.shape) - 1)).clamp(max=0) for part, x in policy.items()}
    stats = {"entropy": 4.0, "log_z": 1.0, "log_sum_p2": -1.0}  # of the policy, for losses that ask for them
    for name, scale in stats.items():
        tokens[name] = {part: scale * uniform(x.shape) for part, x in policy.items()}
    rows = {}
    if kind == "grouped":  # the first two of one prompt
        rows = {"advantages": torch.tensor(ADVANTAGES, dtype=torch.float64), "prompts": torch.tensor([0, 0, 1])}
    if kind == "paired":
        rows["margin"] = torch.ones(3, dtype=torch.float64)
    return Batch(kind, masks, tokens, rows, torch.zeros(0, dtype=torch.float64))


def _first(lengths: Sequence[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def with_hole(batch: Batch) -> Batch:
    """A token in the middle of a completion is not scored, as of a tool's answer."""
    masks = {part: mask.clone() for part, mask in batch.masks.items()}
    for mask in masks.values():
        mask[1, 1] = False
    return replace(batch, masks=masks)


def unscored(batch: Batch) -> Batch:
    return replace(batch, masks={part: torch.zeros_like(mask) for part, mask in batch.masks.items()})


def extreme(kind: str) -> Iterator[Batch]:
    """What happens: a log-ratio of a few nats, of 30, of 90 and of 1e4; a log-prob of exactly 0."""
    for spread in (4.0, 30.0, 90.0, 1e4):
        for seed in (0, 1):
            yield batch_of(kind, spread, spread, seed)
    zero = batch_of(kind)
    yield replace(zero, tokens={role: {k: 0 * x for k, x in parts.items()} for role, parts in zero.tokens.items()})


def examples(law: str, kind: str) -> Iterator[dict[str, Any]]:
    """Keyword arguments of the law but the loss."""
    ordinary, holed = batch_of(kind), with_hole(batch_of(kind, seed=1))
    if law == "finite":
        yield from ({"batch": batch, "dtype": torch.float32} for batch in extreme(kind))
    elif law == "nothing_scored":
        yield {"batch": unscored(ordinary), "fill": -1.0}  # NaN is the law `mask`'s
    elif law == "gradient":
        yield from ({"batch": batch_of(kind, 1.0, 0.125, seed)} for seed in (0, 1))
    else:
        for batch in (ordinary, holed):
            yield from ({"batch": batch, **choice} for choice in CHOICES.get(law, lambda: [{}])())


CHOICES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "mask": lambda: [{"fill": fill} for fill in (-7.0, torch.inf, torch.nan)],
    "padding": lambda: [{"left": 0, "right": 2}, {"left": 2, "right": 1}],
    "permutation": lambda: [{"order": [2, 0, 1]}],
    "split": lambda: [{"deal": [[0, 1], [2]]}, {"deal": [[0], [1], [2]]}],
    "empty_example": lambda: [{"row": 1}],
    "low_precision": lambda: [{"dtype": torch.bfloat16}, {"dtype": torch.float16}],
    "direction": lambda: [{"level": 1.0}],
    "renumbered": lambda: [{"first": 2**25}, {"first": 2**42}],
}
"""law -> what its equation speaks of beside the batch."""
