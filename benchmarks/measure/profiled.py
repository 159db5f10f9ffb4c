"""What torch's profiler says of a piece of work: its kernels, and what the host does beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .clock import time_ms, wait

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""What the host calls to wait for the device, as a profile names it."""
OPERATOR = re.compile(r"(?!autograd::|torch::)\w+::")
"""How the name of an operator begins; autograd's own spans hold Python functions too."""


def profiled_once(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """The milliseconds that it takes under the profiler, which slows the host down, and the profile's events."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as prof:
        elapsed = time_ms(work, device)
    wait(device)
    return elapsed, prof.events()


def host_share(work: Callable[[], Any], device: torch.device) -> float:
    """The share of the work's time that is the host's own: on a GPU what it does not wait for the device, on a CPU what
    lies outside of torch's operators."""
    elapsed, events = profiled_once(work, device)
    if device.type == "cuda":
        return float(figures(events, elapsed, 0)["host_ms"]) / elapsed
    return 1 - operators_ms(events) / elapsed


def operators_ms(events: Iterable[Any]) -> float:
    """Milliseconds that operators cover together."""
    spans = ((e.time_range.start, e.time_range.end) for e in events if OPERATOR.match(e.name))
    return union(spans) / 1e3


def figures(events: Iterable[Any], elapsed_ms: float, top: int) -> dict[str, Any]:
    """What a profile says of a step of so many milliseconds. events: `torch.profiler.profile.events()`, in us."""
    spans, total, calls, waited = [], Counter[str](), Counter[str](), 0.0
    for event in events:
        if event.is_user_annotation:  # spans that say which kernels lie in them
            continue
        took = event.time_range.elapsed_us()
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            total[event.name] += took
            calls[event.name] += 1
        elif event.name in WAITS:
            waited += took
    busy_ms = union(spans) / 1e3
    return {
        "gpu_busy_ms": busy_ms,
        "gpu_idle": 1 - busy_ms / elapsed_ms,
        "host_ms": elapsed_ms - waited / 1e3,
        "launches": sum(calls.values()),
        "kernels": longest(total, calls, elapsed_ms, top),
    }


def figures_of_cpu(events: Iterable[Any], elapsed_ms: float, top: int) -> dict[str, Any]:
    """The same of a CPU: the operators by what they take themselves, and what lies outside of all."""
    kept = list(events)
    total, calls = Counter[str](), Counter[str]()
    for event in kept:
        if OPERATOR.match(event.name):
            total[event.name] += event.self_cpu_time_total
            calls[event.name] += 1
    listed = longest(total, calls, elapsed_ms, top)
    return {"host_ms": elapsed_ms - operators_ms(kept), "launches": sum(calls.values()), "operators": listed}


def longest(total: Counter[str], calls: Counter[str], elapsed_ms: float, top: int) -> list[dict[str, Any]]:
    """total: us by name."""
    return [
        {"name": name, "ms": us / 1e3, "share": us / 1e3 / elapsed_ms, "calls": calls[name]}
        for name, us in total.most_common(top)
    ]


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The length that intervals cover together."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
