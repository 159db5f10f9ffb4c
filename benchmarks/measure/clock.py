"""Time and memory of pieces of work, interleaved in one process.

The contestants of a case take turns, in an order that rotates from round to round, so that a machine that slows down
slows all of them down. Times are wall-clock milliseconds with the GPU drained before and after.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from logratio.trainers.logs.runlog import peak_mem_mib, reset_peak_mem

from ..memory.gpus import known_as

Name = TypeVar("Name")


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_ms(work: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return (time.perf_counter() - start) * 1e3


def cpu_ms(work: Callable[[], Any], device: torch.device) -> float:
    """What the process's threads worked, without the time that others had the processor."""
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


def interleaved(
    works: Mapping[Name, Callable[[int], Any]],
    device: torch.device,
    *,
    repeats: int,
    warmup: int = 1,
    clock: Callable[[Callable[[], Any], torch.device], float] = time_ms,
) -> dict[Name, list[float]]:
    """`repeats` times of each, in ms, after `warmup` rounds that do not count.

    Each is called with the round's number, from 0 on in the rounds that count, negative in those that do not.
    """
    names = list(works)
    times: dict[Name, list[float]] = {name: [] for name in names}
    for round_ in range(-warmup, repeats):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = clock(partial(works[name], round_), device)
            if round_ >= 0:
                times[name].append(elapsed)
    return times


def percentiles(times: list[float], name: str) -> dict[str, float]:
    """{name_p20, name_p50, name_p80}; of fewer than five values p20 and p80 are the least and the greatest."""
    ordered = sorted(times)
    low, high = ordered[0], ordered[-1]
    if len(ordered) >= 5:
        fifths = statistics.quantiles(ordered, n=5, method="inclusive")
        low, high = fifths[0], fifths[-1]
    return {f"{name}_p20": low, f"{name}_p50": statistics.median(ordered), f"{name}_p80": high}


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """The median over rounds of their time / ours: paired, so that a slow moment counts on both sides."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def peak_mem(work: Callable[[], Any], device: torch.device, *, beyond: float = 0.0) -> float | None:
    """MiB that are allocated on a GPU at the worst moment of `work`, less `beyond`; None on a CPU.

    A CPU's allocator keeps what it has once had, so that the order of the contestants would decide.
    """
    if device.type != "cuda":
        work()
        return None
    free_memory()
    reset_peak_mem(device)
    work()
    wait(device)
    return peak_mem_mib(device) - beyond


def allocated_mib(device: torch.device) -> float:
    """What is allocated on a GPU now; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def gpu_of(device: torch.device) -> str | None:
    """The name of a GPU in `memory.gpus.GPUS`; None of a CPU, and of a GPU that is not there."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return known_as(found.name, found.total_memory)


def free_memory() -> None:
    """Let go of what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
