"""Gradients of several processes that hold the whole model each, added up once a step, behind its last backward pass.

Not inside that pass, as DistributedDataParallel does: there a process that runs out of memory cannot step back, because
the others wait for it. What that costs is that nothing is sent while gradients are still computed; with adapters there
is little to send. A parameter that has no gradient on some process (an expert that none of its tokens has met) counts
as zero there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce, broadcast

BUCKET_NUMEL = 2**25  # sent at a time; so many values wait beside the gradients


def least_of_all(accelerator: Accelerator, values: Sequence[int]) -> Tensor:
    """The least of each value over all processes, on the device. Nothing is waited for."""
    least = torch.tensor(values).to(accelerator.device, non_blocking=True)
    all_reduce(least, op=ReduceOp.MIN)
    return least


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradients by their sums over all processes. Nothing is waited for."""
    for bucket in buckets(parameters):
        sums = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        all_reduce(sums)
        for p, part in zip(bucket, sums.split([p.numel() for p in bucket]), strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(part.view_as(p))


def buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, as many of one dtype at a time as make up BUCKET_NUMEL, or one that is larger."""
    bucket: list[nn.Parameter] = []
    filled = 0
    for p in parameters:
        if bucket and (filled + p.numel() > BUCKET_NUMEL or p.dtype != bucket[0].dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append(p)
        filled += p.numel()
    if bucket:
        yield bucket


@torch.no_grad()
def start_alike(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Give all processes the main one's values of what trains."""
    if accelerator.num_processes > 1:
        for p in parameters:
            broadcast(p.detach(), src=0)
