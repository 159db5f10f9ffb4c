"""Metrics of several batches are those of one."""

import math
from itertools import permutations

import pytest
import torch

from logratio.losses import Largest, Mean, Smallest

VALUES = torch.tensor([3.0, -1.0, math.nan, 5.0, -4.0])
KNOWN = torch.tensor([True, True, False, True, False])


def test_a_mean_a_largest_and_a_smallest_by_hand():
    assert Mean.of(VALUES, KNOWN).value == pytest.approx(7 / 3)
    assert Largest.of(VALUES, KNOWN).value == 5
    assert Smallest.of(VALUES, KNOWN).value == -1
    assert Largest.of(torch.tensor([[1.0, 2.0]])).value == 2 and Smallest.of(torch.tensor([[1.0, 2.0]])).value == 1
    assert Largest.of(VALUES).total.isnan() and Smallest.of(VALUES).total.isnan()


@pytest.mark.parametrize("kind", [Mean, Largest, Smallest])
def test_of_nothing_they_are_0_of_0(kind):
    for values in (VALUES, VALUES[:0]):
        nothing = kind.of(values, torch.zeros(len(values), dtype=torch.bool))
        assert type(nothing) is kind and (nothing.total.item(), nothing.count.item()) == (0, 0)
        some = kind.of(torch.tensor([-2.0]))
        for joined in (nothing.joined(some), some.joined(nothing)):
            assert type(joined) is kind and joined.value == -2
        assert nothing.joined(nothing).count == 0


@pytest.mark.parametrize("kind", [Mean, Largest, Smallest])
def test_in_parts_and_in_any_order_they_are_the_same(kind):
    parts = [kind.of(VALUES[at], KNOWN[at]) for at in (slice(0, 1), slice(1, 3), slice(3, 5))]
    for a, b, c in permutations(parts):
        assert a.joined(b).joined(c).value == kind.of(VALUES, KNOWN).value


def test_they_have_no_graph():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not any(x.requires_grad for kind in (Mean, Largest, Smallest) for x in kind.of(values))
