"""How far a student's next-token distribution is from a teacher's, over the whole vocabulary, without keeping logits.

`linear_jsd` is the front door, `_eager` the plain definition; the chunked form is `_two_gemm.TwoGemm` over the tile of
`_jsd_tile.py`, on a GPU over that of `_triton_jsd.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..options import check_choice, check_positive
from ._jsd_tile import JsdTile, Teacher
from ._tile import Tile, Transform
from ._two_gemm import TwoGemm
from .logps import autocast, check_head, chosen_tile, default_chunk_tokens

IMPLEMENTATIONS = {
    "auto": "the fastest that applies",
    "eager": "plain autograd over full logits",
    "two_gemm": "chunked, no logits kept",
    "triton": "two_gemm with its tile in one Triton kernel, on a GPU, not for float64",
}


def linear_jsd(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    impl: str = "auto",
    chunk_tokens: int | None = None,
) -> Tensor:
    """JSD(beta) = beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, GKD (arXiv 2306.13649 Eq. 1).

    p = softmax(z), z the student's logits as `linear_logps` has them, q that of the teacher's; both at `temperature`.
    beta=0 is KL(q || p), forward, and beta=1 KL(p || q), reverse, to which JSD / beta and JSD / (1 - beta) tend; JSD
    itself tends to 0 there. Every value is at least 0, and JSD at most -beta log beta - (1 - beta) log(1 - beta).

    hidden: [N, H]; weight: [V, H]; bias: [V]; the teacher's likewise, with a width and a dtype of its own, but the same
    words: V must be one. Models of one tokenizer may pad V differently (Qwen2.5 has 151,936 rows up to 3B and 152,064
    from 7B on): give the rows that both have, and p and q are of these words.
    Returns [N] nats, float32 (float64 for float64 inputs), with gradients to hidden, weight and bias, none to the
    teacher; the temperature divides the gradient and nothing makes up for it (Hinton's factor of its square).

    impl, chunk_tokens: as in `linear_logps` (triton where neither model is in float64), with two tiles
    [chunk_tokens, V] alive: half as many rows by default.
    With H of one size for both, in units of a product of N H V: 3 with a frozen head, 6 with a trainable one.

    Raises ValueError for shapes, values and devices that do not fit, TypeError for dtypes, ImportError for triton where
    it is not installed, and in the backward of two_gemm and triton RuntimeError for a second derivative
    (create_graph=True), which only eager has.
    Differs from TRL 1.16's generalized_jsd_loss: no sum over tokens; float32 at least, where TRL is in the logits'
    dtype; finite, and of a right gradient, where a probability underflows.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
    with torch.no_grad():
        of_teacher = autocast(teacher_hidden, teacher_weight, teacher_bias)
    _check(hidden, weight, bias, of_teacher)
    check_choice("impl", impl, IMPLEMENTATIONS)
    check_positive("temperature", temperature)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must be in [0, 1]")
    for name, value in (("softcap", softcap), ("teacher_softcap", teacher_softcap)):
        if value is not None:
            check_positive(name, value)
    transform = Transform(temperature, logit_scale, softcap)
    teacher = Teacher(*of_teacher, Transform(temperature, teacher_logit_scale, teacher_softcap))
    if impl == "eager":
        return _eager(hidden, weight, bias, teacher, transform, beta)
    rows = default_chunk_tokens(hidden, weight) // 2 if chunk_tokens is None else chunk_tokens
    check_positive("chunk_tokens", rows)
    make_tile = functools.partial(_tile(impl, hidden, teacher.hidden), teacher=teacher, beta=beta)
    numbers = torch.arange(len(hidden), device=hidden.device)
    grad = torch.is_grad_enabled()
    values: Tensor
    (values,) = TwoGemm.apply(hidden, weight, bias, numbers, None, transform, make_tile, rows, (), grad)
    return values


def _tile(impl: str, hidden: Tensor, teacher_hidden: Tensor) -> Callable[..., Tile]:
    return chosen_tile(impl, (hidden, teacher_hidden), JsdTile, _triton_tile)


def _triton_tile() -> Callable[..., Tile]:
    from ._triton_jsd import TritonJsdTile  # not before it is needed

    return TritonJsdTile


def _eager(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Teacher,
    transform: Transform,
    beta: float,
) -> Tensor:
    raw = linear(hidden, weight, bias)
    dtype = torch.promote_types(raw.dtype, torch.float32)
    log_p = transform(raw.to(dtype)).log_softmax(-1)
    with torch.no_grad():
        log_q = teacher.transform(linear(teacher.hidden, teacher.weight, teacher.bias).to(dtype)).log_softmax(-1)
    if beta == 0:
        return _kl(log_q, log_p)
    if beta == 1:
        return _kl(log_p, log_q)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    for of, (h, w, b) in {"": (hidden, weight, bias), "teacher_": teacher}.items():
        if h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1]:
            raise ValueError(
                f"{of}hidden must be [N, H] and {of}weight [V, H], got {list(h.shape)} and {list(w.shape)}"
            )
        check_head(h, w, b, of)
    if len(hidden) != len(teacher[0]):
        raise ValueError(f"hidden has {len(hidden)} tokens and teacher_hidden {len(teacher[0])}: they must be the same")
    if len(weight) != len(teacher[1]):
        raise ValueError(
            f"the student has {len(weight)} words and the teacher {len(teacher[1])}, but a divergence is over one "
            f"vocabulary; of models with one tokenizer give the rows that both have, "
            f"weight[:{min(len(weight), len(teacher[1]))}]"
        )
