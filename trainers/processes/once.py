"""What one process does for all of them: each has its result, or what it raised."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..errors import UserError, first_line

T = TypeVar("T")
ASKED_AGAIN_S = 2.0  # from one "are you done?" of the waiting processes to the next


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


@contextlib.contextmanager
def raised_together(accelerator: Accelerator) -> Iterator[None]:
    """A UserError that is raised inside on one process is raised at the end on all of them."""
    error: UserError | None = None
    try:
        yield
    except UserError as failed:
        error = failed
    said = [None if error is None else str(error)]
    if accelerator.num_processes > 1:
        said = gather_object(said)
    if error is not None:
        raise error
    for message in said:
        if message is not None:
            raise UserError(message)


def once(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns, done by the main process, then by the first one of each other node, where it may find what
    the main process left on a disk that they share; the others are told. What it raises is raised on all processes.

    T: what can be pickled. The others do not wait in one collective, which would end after its time, but ask now and
    then; where a process is killed, that fails on all of them.
    """
    if accelerator.num_processes == 1:
        return work()
    first = accelerator.is_local_main_process
    done = _told(accelerator, work if accelerator.is_main_process else None)
    others = _told(accelerator, work if first and not accelerator.is_main_process else None)
    found: list[T | None] = [theirs if mine is None else mine for mine, theirs in zip(done, others, strict=True)]
    ranks = accelerator.gather(torch.tensor([accelerator.process_index if first else -1], device=accelerator.device))
    # the first process of this one's node is the nearest of those
    result = found[max(rank for rank in ranks.tolist() if rank <= accelerator.process_index)]
    assert result is not None
    return result


def _told(accelerator: Accelerator, work: Callable[[], T] | None) -> list[T | None]:
    """Of every process what its work has returned; None: it had none."""
    result: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        assert work is not None
        try:
            result.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True) if work else None
    if thread:
        thread.start()
    while True:
        if thread:
            thread.join(ASKED_AGAIN_S)
        busy = torch.tensor([int(thread is not None and thread.is_alive())], device=accelerator.device)
        if not int(accelerator.gather(busy).sum()):
            break
    said: list[tuple[str | None, T | None]] = gather_object(
        [(first_line(failed[0]) if failed else None, result[0] if result else None)]
    )
    if failed:
        raise failed[0]
    for reason, _ in said:
        if reason is not None:
            raise UserError(reason)
    return [told for _, told in said]
