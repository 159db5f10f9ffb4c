"""A token for every row as one launch: buffers that stay where they are, and on a GPU a CUDA graph for each shape.

A small model's token is a thousand kernels of some microseconds, and launching each from Python takes longer than
running it. A graph launches all at once, but of fixed shapes, on fixed memory: so what a step reads and writes are
buffers, rows and places are rounded up (`spans`), and rows that are not in use compute what nobody reads. Elsewhere the
same step is called on the same buffers.

Graphs are kept between calls of `sample` (each takes some forward passes to make, about as long as 50 tokens), for as
long as `fingerprint` says that they would be captured alike: weights that an optimizer changes in place are read anew
at every launch.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ...errors import first_line
from ...layers.lora_layers import FusedLora, part_of
from .slots import SlotCache

GRAPHS = ("cuda",)
"""Devices that have them."""
LEAST_ROWS = 8
LEAST_SEEN = 256
"""Shapes smaller than these are not worth a graph of their own."""
AT_ONCE = 1 / 20
KEPT = 1 / 10
"""Of a GPU's memory: what room may be made of before tokens need it, and what may stay between calls."""

BROKEN: list[Any] = []
"""Graphs whose capture failed: the allocator may go on asking them which stream is theirs."""


class NotCaptured(Exception):
    """A step cannot be captured; the message says why. The device is as it was."""


def above(count: int, least: int, most: int) -> int:
    """The next power of two, from `least` on, at most `most`."""
    return min(max(least, 1 << (count - 1).bit_length()), most)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are captured; one of a device, since cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device=device)


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory


class Captured:
    """The buffers of up to `slots` rows, and the graphs that work on them.

    tokens, numbers: of each row, what was said last, and what the next is drawn by. said: [slots, 2] float64, the drawn
    token and its log-probability. trial: steps are asked first whether the host has to wait for them.
    """

    def __init__(self, policy: Any, slots: int, device: torch.device, *, trial: bool = False) -> None:
        self.made_of, self.device, self.trial = fingerprint(policy), device, trial
        self.launches = device.type in GRAPHS
        self.cache = SlotCache(slots, device, at_once=int(AT_ONCE * memory_of(device)) if self.launches else 0)
        self.tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self.numbers = torch.zeros(slots, dtype=torch.float64, device=device)
        self.said = torch.zeros(slots, 2, dtype=torch.float64, device=device)
        self.upload = torch.zeros(slots, dtype=torch.float64, pin_memory=self.launches)
        self.copies = Copies(policy)
        self.forget()

    def forget(self) -> None:
        """The graphs; a pool that all have left may not be entered again."""
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.launches else None
        self.pool_bytes, self.room = 0, self.cache.room

    def release(self) -> None:
        """It will not be used again: what refers to itself in a ring would wait for the garbage collector."""
        self.graphs.clear()
        self.cache.layers = []

    def fits(self, policy: Any, slots: int) -> bool:
        return self.cache.slots >= slots and self.made_of == fingerprint(policy)

    def begin(self, most: int) -> None:
        """A call begins, in which no row will have more tokens than `most`; weights may have changed since the last."""
        self.cache.clear()
        self.cache.most = most
        self.copies.refresh()

    @property
    def kept(self) -> bool:
        """Whether it is so small that it may wait for the next call."""
        held = self.cache.token_bytes * self.cache.room + self.pool_bytes
        return not self.launches or held <= KEPT * memory_of(self.device)

    def spans(self, rows: int, seen: int) -> tuple[int, int]:
        """Rows and places of a step for so many."""
        return above(rows, LEAST_ROWS, self.cache.slots), above(seen, LEAST_SEEN, self.cache.room)

    def draw_by(self, numbers: list[float]) -> None:
        """The numbers of the first rows. The last step is over, or the copy that it waits for could be overwritten."""
        count = len(numbers)
        self.upload[:count] = torch.tensor(numbers, dtype=torch.float64)
        self.numbers[:count].copy_(self.upload[:count], non_blocking=True)

    def run(self, key: Hashable, step: Callable[[], Tensor | None]) -> Tensor | None:
        """What step() returns, which stays as it is until the next call. key: all that it depends on, beside buffers
        and what `fingerprint` has."""
        if not self.launches:
            with self.copies.in_place():
                return step()
        if self.room != self.cache.room:  # which has moved
            self.forget()
        if key not in self.graphs:
            with self.copies.in_place(), uncached(self.device):
                self.graphs[key] = self.capture(step)
        graph, out = self.graphs[key]
        graph.replay()
        return out

    def capture(self, step: Callable[[], Tensor | None]) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
        """Run it until nothing is left to be made by a first call, then capture it; rows are as before."""
        current, side = torch.cuda.current_stream(self.device), side_stream(self.device)
        state = [x.clone() for x in (self.tokens, self.cache.lengths)]
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                step()
                self.restore(state)
                if self.trial:
                    with waiting_refused():
                        step()
                    self.restore(state)
                before = torch.cuda.memory_reserved(self.device)
                out = self.captured(graph, step)
                self.pool_bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            torch.cuda.synchronize(self.device)
            raise NotCaptured(f"{type(error).__name__}: {first_line(error)}") from error
        finally:
            current.wait_stream(side)
        return graph, out

    def captured(self, graph: torch.cuda.CUDAGraph, step: Callable[[], Tensor | None]) -> Tensor | None:
        """What step() returns, on a side stream, where nothing is executed. An error leaves no capture under way."""
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            out = step()
            graph.capture_end()
        except BaseException:
            self.recover(graph)
            raise
        return out

    def recover(self, broken: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed. Where the device refuses to end it, torch leaves out the allocator's part, and the
        random generator's, which the end of any other capture sets free."""
        try:
            broken.capture_end()
            broken.reset()
            return
        except Exception:
            BROKEN.append(broken)
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)  # type: ignore[arg-type]
        with contextlib.suppress(Exception):
            other = torch.cuda.CUDAGraph()
            other.capture_begin(capture_error_mode="thread_local")
            self.said.add(1)
            other.capture_end()

    def restore(self, state: list[Tensor]) -> None:
        for buffer, before in zip((self.tokens, self.cache.lengths), state, strict=True):
            buffer.copy_(before)


@contextlib.contextmanager
def uncached(device: torch.device) -> Iterator[None]:
    """Autocast as it is, but for its cache of cast weights: a graph that reads it would outlive it."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False):
        yield


@contextlib.contextmanager
def waiting_refused() -> Iterator[None]:
    """Inside, what makes the host wait for the device raises: in a capture it would break that instead."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # that it does not find everything
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Copies:
    """The weights of adapters in the dtype that they multiply in, where it is not their own: cast once a call, not in
    every token. The modules hold them while a step is captured, and never else."""

    @torch.no_grad()
    def __init__(self, policy: Any) -> None:
        self.own: list[tuple[nn.Module, Any, Tensor]] = []
        x = torch.empty(0, dtype=policy.causal_lm.dtype, device=policy.causal_lm.device)
        for layer in policy.causal_lm.modules():
            part = part_of(layer, x) if isinstance(layer, FusedLora) else None
            if part is None:
                continue
            for module in (*layer.lora_A.values(), *layer.lora_B.values()):
                weight: Any = module.weight
                if (weight is part.a or weight is part.b) and weight.dtype is not part.dtype:
                    self.own.append((module, weight, torch.empty_like(weight, dtype=part.dtype)))

    @torch.no_grad()
    def refresh(self) -> None:
        if self.own:
            torch._foreach_copy_([copy for *_, copy in self.own], [weight.detach() for _, weight, _ in self.own])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        for module, _, copy in self.own:
            module._parameters["weight"] = copy  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, weight, _ in self.own:
                module._parameters["weight"] = weight


def fingerprint(policy: Any) -> tuple[Any, ...]:
    """Equal for two states of a policy of which a graph of one is right for the other: where its tensors lie, how its
    layers compute, with which adapters, in which dtype. Values are left out."""
    found: list[Any] = []
    for module in policy.modules():
        state = module.__dict__
        found.append((id(type(module)), tuple(state["_forward_hooks"]), tuple(state["_forward_pre_hooks"])))
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            does = [str(getattr(module, name, None)) for name in ("scaling", "active_adapters", "merged_adapters")]
            found.append((*does, module.disable_adapters))
        for x in (*state["_parameters"].values(), *state["_buffers"].values()):
            if x is not None:
                found.append((x.data_ptr(), x.dtype, x.shape, id(getattr(x, "quant_state", None))))
    kind = policy.causal_lm.device.type
    mixed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    scales = {k: v for k, v in policy.head_options().items() if k != "bias"}
    return (mixed, policy.attention, str(scales), *found)
