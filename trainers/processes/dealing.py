"""How work is dealt to processes, and how what they made of it comes together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from ..errors import UserError

T = TypeVar("T")


def deal(loads: Sequence[int], accelerator: Accelerator) -> list[int]:
    """Which of the items are this process's: the heaviest left goes to the process with the least so far."""
    world, rank = accelerator.num_processes, accelerator.process_index
    if world == 1:
        return list(range(len(loads)))
    shares: list[list[int]] = [[] for _ in range(world)]
    carried = [0] * world
    for i in sorted(range(len(loads)), key=lambda i: -loads[i]):
        lightest = carried.index(min(carried))
        shares[lightest].append(i)
        carried[lightest] += loads[i]
    return sorted(shares[rank])


def share(prompts: Sequence[T], accelerator: Accelerator) -> Sequence[T]:
    """Every so many-th prompt, beginning with this process's own. UserError where some process would get none."""
    rank, world = accelerator.process_index, accelerator.num_processes
    if len(prompts) < world:
        raise UserError(f"a step of {len(prompts)} prompts cannot be dealt to {world} processes; raise --batch_size")
    return prompts[rank::world]


def shares(sizes: Sequence[int], accelerator: Accelerator) -> list[Sequence[int]]:
    """`share` of consecutive steps of so many prompts: of each step, the places of this process's own among those of
    all steps."""
    ends = list(accumulate(sizes, initial=0))
    return [share(range(*between), accelerator) for between in pairwise(ends)]


def any_process(accelerator: Accelerator | None, here: bool) -> bool:
    """Whether it is so on any process; asked on all of them. accelerator: None: there is one."""
    if accelerator is None or accelerator.num_processes == 1:
        return here
    return bool(accelerator.reduce(torch.tensor([here], dtype=torch.int32, device=accelerator.device), "sum").item())


def largest(accelerator: Accelerator, here: float) -> float:
    """The largest of the processes' numbers."""
    if accelerator.num_processes == 1:
        return here
    return float(accelerator.gather(torch.tensor([here], dtype=torch.float64, device=accelerator.device)).max())


def gather_rows(accelerator: Accelerator, rows: Tensor) -> tuple[Tensor, slice]:
    """The rows of all processes, which may hold different numbers of them, and which of them are this process's."""
    if accelerator.num_processes == 1:
        return rows, slice(None)
    counts = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).tolist()
    padded = accelerator.pad_across_processes(rows.to(accelerator.device), dim=0)
    parts = accelerator.gather(padded).to(rows.device).split(max(counts))
    start = sum(counts[: accelerator.process_index])
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]), slice(start, start + len(rows))
