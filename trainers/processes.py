"""How work is dealt to processes, and how what they made of it comes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from .errors import UserError

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


def gather_rows(accelerator: Accelerator, rows: Tensor) -> tuple[Tensor, slice]:
    """The rows of all processes, which may hold different numbers of them, and which of them are this process's."""
    if accelerator.num_processes == 1:
        return rows, slice(None)
    counts = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).tolist()
    padded = accelerator.pad_across_processes(rows.to(accelerator.device), dim=0)
    parts = accelerator.gather(padded).to(rows.device).split(max(counts))
    start = sum(counts[: accelerator.process_index])
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]), slice(start, start + len(rows))


def on_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """What `make` returns on the main process, on all of them; a UserError of its is raised on all."""
    said: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            said[0] = make()
        except UserError as error:
            if accelerator.num_processes == 1:
                raise
            said[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(said)
    if said[1] is not None:
        raise UserError(said[1])
    return said[0]  # type: ignore[no-any-return]
