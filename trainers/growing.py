"""`--micro_batch_tokens auto`: as many as there is room for, found by the run's own first steps.

The first step that takes several micro-batches is the trial: what its largest one took beside
weights, gradients and optimizer state tells what a token takes, and what is free, how many fit. That is measured, not
predicted, so it holds for every model, mask and kernel; and since the budget never changes a result, the trial is a
step like any other. Fewer fit where earlier moments took more (a rollout, or a step that ran out of memory), since
torch tells the largest peak only. What is too many after all is halved as ever (`memory.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from .errors import UserError
from .memory import Memory
from .processes.sharding import meet_inside
from .window import MicroBatch

SPARE = 0.15
"""Of a device's memory: for fragments, and for micro-batches that take more a token than the trial's."""
ROUND = 1024


class Meter:
    """Bytes of a GPU, by torch's allocator: that are allocated, that were at most, and that this process could have in
    all."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def room(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)


class Growth:
    """Grows a run's micro-batches once; meter: None, they stay as they are."""

    def __init__(self, memory: Memory, meter: Meter | None) -> None:
        self.memory, self.meter, self.base = memory, meter, 0

    def before(self) -> None:
        """A step begins."""
        if self.meter is not None:
            self.base = self.meter.allocated()

    def after(self, micros: Sequence[MicroBatch]) -> None:
        """It has been taken, with these micro-batches and no gradient left. Called on all processes alike."""
        meter, memory = self.meter, self.memory
        if meter is None or len(micros) < 2:
            return
        self.meter = None
        largest = max(micro.batch.input_ids.numel() for micro in micros)
        gradients = sum(p.numel() * p.element_size() for p in memory.trained)
        taken = max(meter.peak() - self.base - gradients, 1)
        free = (1 - SPARE) * meter.room() - meter.allocated() - gradients
        fitting = int(free / taken * largest) // ROUND * ROUND
        everyones = memory.accelerator.gather(torch.tensor([fitting], device=memory.accelerator.device))
        tokens, before = int(everyones.min()), memory.micro_batch_tokens
        memory.micro_batch_tokens = max(tokens, before)
        found = f"{tokens} from here on" if tokens > before else f"{before} as before"
        memory.notes.append(
            f"--micro_batch_tokens auto: {found}; {largest} took {taken / 2**20:,.0f} MiB beside weights, gradients "
            f"and optimizer state, and {free / 2**20:,.0f} MiB are free for them"
        )


def make_growth(asked: int | str, memory: Memory, accelerator: Accelerator) -> tuple[Growth, list[str]]:
    """What the option asks for, and what to tell about it. UserError where a process could not step back."""
    if asked != "auto":
        return Growth(memory, None), []
    if meet_inside(accelerator):
        raise UserError(
            "--micro_batch_tokens auto: processes with sharded weights or gradients cannot try again where one runs "
            "out of memory; give a number"
        )
    if accelerator.device.type != "cuda":
        return Growth(memory, None), [
            f"--micro_batch_tokens auto: {memory.micro_batch_tokens}, where there is no GPU to fill"
        ]
    return Growth(memory, Meter(accelerator.device)), []
