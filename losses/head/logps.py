"""The LM head: hidden states and targets in, per-token log-probabilities out, without keeping logits.

`linear_logps` is the front door, `_eager` the plain definition that everything else is measured against.
The chunked form that never recomputes the head is in `_two_gemm.py`, its tile on a GPU in `_triton.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..options import check_choice, check_positive
from ._tile import STATS, Tile, TorchTile, Transform
from ._two_gemm import TwoGemm
from .support import OUTSIDE, Kept, Support, checked

IMPLEMENTATIONS = {
    "auto": "the fastest that applies",
    "eager": "plain autograd over full logits",
    "two_gemm": "chunked, no logits kept",
    "triton": "two_gemm with its tile in one Triton kernel, on a GPU, not for float64",
}
FROZEN_ROWS = 1024
TILE_MEMORY = 1 / 32
"""Share of a GPU's memory that the default chunk's logits, and their gradients, may take: 2.5 GiB of 80."""


class TokenLogps(NamedTuple):
    """[N] each, nats, float32 (float64 for float64 inputs); None what was not asked for.

    entropy: -sum_v p log p. log_z: logsumexp_v z. log_sum_p2: log sum_v p^2, without gradient. is_top1: bool, whether
    the target is what `torch.argmax` of the logits gives, of several that are equally large the first. divergence: of
    `linear_jsd`, where it has been asked for beside these.
    """

    logps: Tensor
    entropy: Tensor | None = None
    log_z: Tensor | None = None
    log_sum_p2: Tensor | None = None
    is_top1: Tensor | None = None
    divergence: Tensor | None = None


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    support: Support | None = None,
    stats: None = None,
    impl: str = "auto",
    chunk_tokens: int | None = None,
) -> Tensor: ...


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    support: Support | None = None,
    stats: Collection[str],
    impl: str = "auto",
    chunk_tokens: int | None = None,
) -> TokenLogps: ...


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    support: Support | None = None,
    stats: Collection[str] | None = None,
    impl: str = "auto",
    chunk_tokens: int | None = None,
) -> Tensor | TokenLogps:
    """log p_t = z[t, y_t] - logsumexp_v z[t, v], z = softcap tanh(logit_scale (h W^T + b) / softcap) / temperature.

    hidden: [N, H]; weight: [V, H] and bias: [V] or None, all of one dtype (float64, float32, bfloat16,
    float16); under autocast they are cast to its dtype. targets: [N] int64 in [0, V).
    Returns log-probabilities [N] in nats, float32 (float64 for float64 inputs), with gradients to hidden, weight, bias.
    stats: some of entropy, log_z, log_sum_p2, is_top1; then a `TokenLogps` with these row statistics beside them.

    support: the words that each token was sampled from; then sums over v, in p, in statistics and in gradients, are
    over these, and a word outside has p = 0. Where no token keeps the whole vocabulary, the products are of the words
    that some token keeps.

    impl: "eager", "two_gemm", "triton", or "auto": triton on a GPU where it is installed and the dtype is not float64,
    else two_gemm. Both go in chunks, chunk_tokens rows of logits alive at a time (default: `default_chunk_tokens`).
    With a frozen head they take two matrix products, forward and backward together, whatever the loss; with a trainable
    one they compute the logits again. triton keeps the logits of half-precision inputs in float32, and makes a chunk's
    statistics and gradient in one kernel; with TRITON_INTERPRET=1 it runs, slowly, on a CPU.

    Raises ValueError for shapes, values, devices and targets that do not fit, a target outside its support among them
    (targets and ids are checked on CPU; on a GPU, where the check would stop the stream, an assertion on the device
    fails), TypeError for dtypes, ImportError for triton where it is not installed, and in the backward of two_gemm and
    triton RuntimeError for a second derivative (create_graph=True), which only eager has.
    Differs from TRL 1.16's fused head: float64 stays float64, and the logits are not computed again in backward.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
    _check(hidden, weight, targets, bias)
    check_choice("impl", impl, IMPLEMENTATIONS)
    check_positive("temperature", temperature)
    if softcap is not None:
        check_positive("softcap", softcap)
    for name in stats or ():
        check_choice("stats", name, STATS)
    asked = tuple(name for name in STATS if name in (stats or ()))
    transform = Transform(temperature, logit_scale, softcap)
    kept = None if support is None else checked(support, targets, len(weight))
    if impl == "eager":
        out = _eager(hidden, weight, targets, bias, kept, transform, asked)
        return out.logps if stats is None else out
    rows = default_chunk_tokens(hidden, weight) if chunk_tokens is None else chunk_tokens
    check_positive("chunk_tokens", rows)
    grad = torch.is_grad_enabled()
    if kept is not None:
        kept, weight, bias, targets = kept.narrowed(weight, bias, targets)
    logps, *values = TwoGemm.apply(
        hidden, weight, bias, targets, kept, transform, _tile(impl, hidden), rows, asked, grad
    )
    return logps if stats is None else TokenLogps(logps, **dict(zip(asked, values, strict=True)))


def default_chunk_tokens(hidden: Tensor, weight: Tensor, memory: float | None = None) -> int:
    """Rows of logits alive at a time, for hidden [N, H] and weight [V, H]: the fewest that keep the products busy.
    memory: of the device in bytes, which is asked where it is not given.

    On a CPU 256 (measured). On a GPU `FROZEN_ROWS` (on an H200, with H from 896 to 4,096, no slower than 4,096 rows by
    more than measurements differ); of a weight that trains, which every chunk adds a gradient of its size to, 4.2
    million / H. No more than take `TILE_MEMORY`; a multiple of 128, at least 256. It is a share of all memory, not of
    what is free: the same chunks, and sums, at every step.
    """
    if hidden.device.type == "cpu":
        return 256
    busy = 4.2e6 / max(hidden.shape[1], 1) if weight.requires_grad else FROZEN_ROWS
    room = TILE_MEMORY * (_device_memory(hidden.device) if memory is None else memory)
    room /= max(len(weight), 1) * tile_bytes(weight)
    return max(256, int(min(busy, room)) // 128 * 128)


def tile_bytes(weight: Tensor) -> int:
    """Of a logit on a GPU: its float32, and of a frozen head in bfloat16 its gradient beside it."""
    return 6 if weight.dtype == torch.bfloat16 and not weight.requires_grad else 4


def _device_memory(device: torch.device) -> float:
    """Bytes; infinite where torch has no way to tell."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


def _tile(impl: str, hidden: Tensor) -> Callable[..., Tile]:
    return chosen_tile(impl, (hidden,), TorchTile, _triton_tile)


def chosen_tile(
    impl: str, hidden: Sequence[Tensor], plain: Callable[..., Tile], compiled: Callable[[], Callable[..., Tile]]
) -> Callable[..., Tile]:
    """The tile that `impl` means. plain: of torch operations. compiled: imports the one of Triton."""
    if impl == "triton":
        return compiled()
    if impl == "two_gemm" or not hidden[0].is_cuda or any(h.dtype == torch.float64 for h in hidden):
        return plain
    try:
        return compiled()
    except ImportError:
        return plain


@functools.cache
def _triton_tile() -> Callable[..., Tile]:
    from ._triton import TritonTile  # not before it is needed: a machine without triton has all the rest

    return TritonTile


def _eager(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    kept: Kept | None,
    transform: Transform,
    asked: tuple[str, ...],
) -> TokenLogps:
    raw = linear(hidden, weight, bias)
    z = transform(raw.to(torch.promote_types(raw.dtype, torch.float32)))
    if kept is not None:
        z = z.masked_fill(kept.outside(len(weight)), OUTSIDE)
    all_logps = z.log_softmax(-1)
    compute = {
        "entropy": lambda: -(all_logps.exp() * all_logps).sum(-1),
        "log_z": lambda: z.logsumexp(-1),
        "log_sum_p2": lambda: (2 * all_logps.detach()).logsumexp(-1),
        "is_top1": lambda: z.argmax(-1) == targets,
    }
    return TokenLogps(all_logps.gather(-1, targets[:, None])[:, 0], **{name: compute[name]() for name in asked})


def autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A head as its products are made: under autocast in its dtype."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:  # as autocast does everywhere
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    shapes = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}, targets {list(targets.shape)}"
    if hidden.ndim != 2 or weight.ndim != 2 or targets.ndim != 1:
        raise ValueError(f"expected hidden [N, H], weight [V, H], targets [N], got {shapes}")
    if hidden.shape[1] != weight.shape[1] or hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"hidden [N, H], weight [V, H] and targets [N] do not agree: {shapes}")
    check_head(hidden, weight, bias)
    check_targets(targets, len(weight))


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, of: str = "") -> None:
    """Raise ValueError for a bias of another shape, TypeError for dtypes. of: before the names, in what is said."""
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{of}bias must be [V] for {of}weight [V, H], got {of}bias {list(bias.shape)}, "
            f"{of}weight {list(weight.shape)}"
        )
    dtypes = {hidden.dtype, weight.dtype} | ({bias.dtype} if bias is not None else set())
    if len(dtypes) > 1 or not hidden.dtype.is_floating_point:
        named = f"{of}hidden {hidden.dtype}, {of}weight {weight.dtype}"
        named += f", {of}bias {bias.dtype}" if bias is not None else ""
        raise TypeError(f"{of}hidden, {of}weight and {of}bias must share one floating dtype, got {named}")


def check_targets(targets: Tensor, words: int) -> None:
    """Raise TypeError where they are not int64, and on a CPU ValueError where one is no word; on a GPU an assertion
    of the device's fails then, since a kernel would find no target and say nothing."""
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be torch.int64, got {targets.dtype}")
    if targets.is_cuda:
        torch._assert_async(((targets >= 0) & (targets < words)).all())
    elif targets.device.type == "cpu" and len(targets):
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= words:
            raise ValueError(f"targets must be in [0, {words}), got values from {low} to {high}")
