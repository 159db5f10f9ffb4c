"""Metrics of a loss as two numbers, which micro-batches and processes join to what one batch would have given."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Mean(NamedTuple):
    """A metric as a detached sum and its count, both scalars: means over a step are exact whatever the split."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count

    @staticmethod
    def of(values: Tensor, where: Tensor | None = None) -> Mean:
        """The mean of `values`, or of those `where` is True."""
        values = values.detach()
        where = torch.ones_like(values, dtype=torch.bool) if where is None else where
        return Mean(torch.where(where, values, 0.0).sum(), where.sum())

    @property
    def value(self) -> float:
        """total / count; NaN where nothing was counted."""
        return float(self.total / self.count)

    def joined(self, other: Mean) -> Mean:
        """Of both batches together."""
        return Mean(self.total + other.total, self.count + other.count)


class Largest(Mean):
    """A metric as its largest value and 1, or 0 and 0 where nothing was counted: joined by the maximum, not the sum."""

    __slots__ = ()
    sign = 1.0

    @classmethod
    def of(cls, values: Tensor, where: Tensor | None = None) -> Largest:  # type: ignore[override]
        """The largest of `values`, or of those `where` is True."""
        values = values.detach()
        where = torch.ones_like(values, dtype=torch.bool) if where is None else where
        some = where.any()
        if not values.numel():
            return cls(values.sum(), some.long())
        most = torch.where(where, cls.sign * values, -math.inf).amax()
        return cls(torch.where(some, cls.sign * most, 0.0), some.long())

    def joined(self, other: Mean) -> Largest:
        """Of both batches together."""
        most = self.sign * torch.maximum(self.sign * self.total, self.sign * other.total)
        both = (self.count > 0) & (other.count > 0)
        # where one has counted nothing, its total is 0
        return type(self)(torch.where(both, most, self.total + other.total), torch.maximum(self.count, other.count))


class Smallest(Largest):
    """The same of the smallest value."""

    __slots__ = ()
    sign = -1.0
