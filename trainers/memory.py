"""Out of memory is no end: what was tried is dropped, and tried again with half of `micro_batch_tokens`.

That budget never changes a result, so the same is computed that would have been with the smaller one from the start,
to the bit: gradients are dropped, the random states set back, the same examples packed again. It stays so small for the
rest of the run.

What is rescued, for torch's OutOfMemoryError:
1. One process: every pass over micro-batches, forward or backward, of a step or before it.
2. Several that hold the whole model each: the same. They learn of it where they meet, which is behind their passes, and
   try again together; gradients that were added up in the meantime are dropped.
What is not, and ends the run in one sentence:
3. Sharded models (FSDP2), whose processes meet in every layer, and sharded gradients (ZeRO-2), in every backward pass.
4. A micro-batch of one example, or of one completion of a rollout, which cannot be divided.
5. What no micro-batch is about: loading the model, the optimizer's state.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from logratio.losses import Kind, Loss

from .batches.packing import PackedBatch
from .errors import UserError, first_line
from .ground.randomness import random_states, set_random_states
from .processes.sharding import meet_inside
from .processes.summing import least_of_all, sum_gradients

T = TypeVar("T")
KEEPERS: WeakSet[Any] = WeakSet()
"""Who keeps memory for speed alone: their `let_go` gives it back."""
REMEDIES = "train adapters (--lora_r 16) of 4-bit weights (--load_in_4bit), or take a GPU with more memory"


class OutOfMemory(torch.OutOfMemoryError):
    """A micro-batch did not fit, on this process or another. smaller: the budget that would divide it; 0: none does,
    and the message says why the run must end."""

    def __init__(self, smaller: int, message: str) -> None:
        super().__init__(message)
        self.smaller = smaller


class Memory:
    """What a run's passes are given: `micro_batch_tokens`, and other tries where these were too many.

    trained: what has gradients. loss: what it is trained with; None: nothing is.
    """

    def __init__(
        self, accelerator: Accelerator, trained: Sequence[nn.Parameter], loss: Loss | None, micro_batch_tokens: int
    ) -> None:
        self.accelerator, self.trained, self.loss = accelerator, trained, loss
        self.micro_batch_tokens = micro_batch_tokens
        self.notes: list[str] = []  # to be told

    def take(self) -> list[str]:
        """What there is to tell since the last time."""
        notes, self.notes = self.notes, []
        return notes

    @contextlib.contextmanager
    def fitting(self, batch: PackedBatch) -> Iterator[None]:
        """Around a pass over one micro-batch: OutOfMemory where it does not fit, UserError where others wait in the
        pass for this process."""
        try:
            yield
            return
        except OutOfMemory:
            raise
        except torch.OutOfMemoryError:
            pass  # outside of this block nothing holds on to its traceback, and by it to what was computed
        smaller, message = self._smaller(batch)
        if self.accelerator.num_processes > 1 and meet_inside(self.accelerator):
            raise UserError(
                message
                or f"process {self.accelerator.process_index} ran out of memory where the others wait for it, so that "
                f"they cannot try again: set --micro_batch_tokens {smaller}"
            )
        raise OutOfMemory(smaller, message)

    def together(
        self, passes: Callable[[], T], *, backward: bool = False, meanwhile: Callable[[], None] | None = None
    ) -> T:
        """passes(), in which no processes meet; where it runs out of memory on one of them, all raise OutOfMemory.

        backward: add up the gradients that they leave, over the processes. meanwhile: called when all is launched and
        nothing waited for; it may be called again where this raises OutOfMemory.
        """
        meanwhile = meanwhile or (lambda: None)
        if self.accelerator.num_processes == 1 or meet_inside(self.accelerator):
            result = passes()
            meanwhile()
            return result
        smaller, message = self.micro_batch_tokens, ""
        try:
            result = passes()
        except OutOfMemory as error:
            smaller, message = error.smaller, str(error)
        if smaller != self.micro_batch_tokens:
            free()  # or there may be no room to take part in the sums
        trained = self.trained if backward else ()
        least = least_of_all(self.accelerator, [smaller, *(-int(p.grad is not None) for p in trained)])
        sum_gradients(trained)
        meanwhile()
        smallest, *had = least.tolist()
        for p, any_had in zip(trained, had, strict=True):
            if not any_had:
                p.grad = None  # as in one process: an optimizer leaves such a parameter alone
        if smallest == self.micro_batch_tokens:
            return result
        if smallest == 0:
            message = next(filter(None, gather_object([message if smaller == 0 else ""])))
        raise OutOfMemory(smallest, message)

    def again(self, attempt: Callable[[], T]) -> T:
        """attempt(), which packs by `micro_batch_tokens`; from the start with fewer while it raises OutOfMemory."""
        while True:
            states = random_states(self.accelerator.device)
            try:
                return attempt()
            except OutOfMemory as error:
                smaller, message = error.smaller, str(error)
            if smaller == 0:
                raise UserError(message)
            for p in self.trained:
                p.grad = None
            free()
            set_random_states(states, self.accelerator.device)
            self.notes.append(
                f"out of memory with --micro_batch_tokens {self.micro_batch_tokens}; {smaller} from here on, "
                "which changes nothing else"
            )
            self.micro_batch_tokens = smaller

    def _smaller(self, batch: PackedBatch) -> tuple[int, str]:
        """The budget halved until it divides this micro-batch; 0 and a sentence where it cannot be divided."""
        example = batch.examples[0]
        compares = self.loss is not None and self.loss.kind in (Kind.PAIRED, Kind.LISTED)
        whole = compares or len(example.completions) == 1
        size, smaller = batch.input_ids.numel(), self.micro_batch_tokens // 2
        while smaller >= size:
            smaller //= 2
        if smaller == 0 or (len(batch.examples) == 1 and whole):
            place = f"row {example.row} of the data set" if example.row >= 0 else "one example"
            shorter = "--max_length"
            if self.loss is not None and self.loss.kind is Kind.GROUPED:
                shorter += " or --max_completion_length"
            said = f"{place} alone, {size} tokens, does not fit into memory"
            return 0, f"{said}: lower {shorter}, add --gradient_checkpointing, {REMEDIES}"
        return smaller, ""


def free() -> None:
    """Give back what nothing refers to any more, and what is kept for speed alone."""
    for keeper in list(KEEPERS):
        keeper.let_go()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def no_room(error: torch.OutOfMemoryError) -> UserError:
    """What to say where smaller micro-batches are no remedy."""
    return UserError(
        "out of memory, and not in a pass that smaller micro-batches would mend but with the model's weights or the "
        f"optimizer's state ({first_line(error)}): {REMEDIES}"
    )
