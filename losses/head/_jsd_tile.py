"""The tile of a divergence from a teacher: two chunks of logits, what they differ by, and its gradient in place.

`TwoGemm` needs of a tile no more than one number a row, and the gradient of that number in the row's logits. So it
does for a divergence what it does for log p: with a frozen head two products of the student's and one of the
teacher's, forward and backward together; with a trainable one the logits of both are made again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ._tile import Coefficients, Logits, Rows, Transform
from .support import Kept

MAX_LOG_RATIO = 80.0
"""Beyond, exp would overflow in float32; the rarer of the two words weighs e^-80 of the other there."""


class Teacher(NamedTuple):
    """What the teacher's logits are made of: hidden [N, H_T], weight [V, H_T], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: Transform


def divergence(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(D [b], dD / dz [b, V]) of the student's log p [b, V], z its logits, and the teacher's log q; see `linear_jsd`.

    With s = log q - log p and m = beta q + (1 - beta) p, log(p / m) is -log(1 + beta (e^s - 1)), and log(q / m) that
    with p and q, beta and 1 - beta exchanged: no logarithm of a sum, and exactly 0 where p = q. At the ends p - q,
    which sums to 0, takes out of a Kullback-Leibler divergence what rounding has added to s in all words alike.
    """
    p, q, s = log_p.exp(), log_q.exp(), log_q - log_p
    if beta in (0, 1):
        apart = torch.where(s.abs() < 1, q * torch.expm1(-s), p - q)
        if beta == 0:
            return (q * s + apart).sum(-1).clamp_min(0), apart
        of_p, value = -s, -(p * s + apart).sum(-1)
    else:
        of_p = -torch.log1p(beta * torch.expm1(s.clamp(max=MAX_LOG_RATIO)))
        of_q = -torch.log1p((1 - beta) * torch.expm1((-s).clamp(max=MAX_LOG_RATIO)))
        value = (beta * q * of_q + (1 - beta) * p * of_p).sum(-1)
        of_p = (1 - beta) * of_p
    return value.clamp_min(0), p * (of_p - (p * of_p).sum(-1, keepdim=True))


class JsdTile:
    """A `Tile` whose `logps` are divergences; the y that it is asked about are the numbers of the rows."""

    of_one: ClassVar[type[Any]] = Logits
    """What makes the logits of one of the two models."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        transform: Transform,
        rows: int,
        *,
        teacher: Teacher,
        beta: float,
    ):
        self.student = self.of_one(weight, bias, transform, rows)
        self.teacher = self.of_one(teacher.weight, teacher.bias, teacher.transform, rows)
        self.weight, self.sum_dtype = self.student.weight, self.student.sum_dtype
        self.teacher_hidden, self.beta = teacher.hidden, beta

    def rows(
        self,
        h: Tensor,
        y: Tensor,
        kept: Kept | None,
        stats: Collection[str],
        coefficients: Coefficients | None,
        lazy: bool = False,
    ) -> Rows:
        """See `Tile`; the gradient is in sum_dtype, and whole."""
        z = self.student.multiply(h)
        of_teacher = self.teacher.multiply(self.teacher_hidden[y].to(self.teacher.weight.dtype))
        values = z.new_empty(len(h))
        for start in range(0, len(h), self.student.block):
            at = slice(start, start + self.student.block)
            slope = self.student.into_logits(z[at], differentiated=coefficients is not None)
            self.teacher.into_logits(of_teacher[at], differentiated=False)
            log_p, log_q = z[at].log_softmax(-1), of_teacher[at].to(z.dtype).log_softmax(-1)
            values[at], gradient = divergence(log_p, log_q, self.beta)
            if coefficients is not None:
                torch.mul(gradient, (coefficients.c[at] * self.student.factor)[:, None], out=z[at])
                if slope is not None:
                    z[at] *= slope
        return Rows(values, {}, None if coefficients is None else z)
