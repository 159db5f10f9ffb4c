"""The oracle's losses of lists against numbers worked out by hand."""

from math import exp, log

import pytest
import torch

from logratio.reference import oracle

LISTS = [[[-1.0, -1.0], [-4.0]], [[-2.0], [], [-3.0]]]
REFS = [[[-1.5, -1.5], [-3.0]], [[-2.0], [], [-1.0]]]  # log-ratios 1, -1 and 0, 0, -2
REWARDS = [[2.0, 0.0], [0.0, 1.0, 1.0]]


def tensors(lists: list[list[list[float]]]) -> list[list[torch.Tensor]]:
    return [[torch.tensor(y, dtype=torch.float64) for y in answers] for answers in lists]


def value(loss_type: str, **options: float) -> float:
    return oracle.listwise(tensors(LISTS), tensors(REFS), REWARDS, loss_type=loss_type, **options).item()


def test_by_hand() -> None:
    """At beta = 0.5 the scores are 0.5, -0.5 and 0, 0, -1; at temperature_alpha = 2 q is a, b and softmax(0, ½, ½)."""
    sp = lambda x: log(1 + exp(x))  # noqa: E731
    a, b = exp(1) / (1 + exp(1)), 1 / (1 + exp(1))
    z = 1 + 2 * exp(0.5)
    q = [1 / z, exp(0.5) / z, exp(0.5) / z]
    s, n = [0.0, 0.0, -1.0], log(2 + exp(-1))
    options = {"beta": 0.5, "temperature_alpha": 2.0}
    infonca = [a * sp(-1) + b * sp(1), sum(x * (n - y) for x, y in zip(q, s, strict=True))]
    assert value("infonca", **options) == pytest.approx(sum(infonca) / 2, rel=1e-12)
    nca = [a * sp(-0.5) + b * sp(0.5) + (sp(0.5) + sp(-0.5)) / 2]
    nca += [sum(x * sp(-y) + sp(y) / 3 for x, y in zip(q, s, strict=True))]
    assert value("nca", **options) == pytest.approx(sum(nca) / 2, rel=1e-12)
    p = [exp(y - n) for y in s]
    exo = [0.0, sum(x * log(x / y) for x, y in zip(p, q, strict=True))]  # of the first list p = q
    assert value("exo_rw", **options) == pytest.approx(sum(exo) / 2, rel=1e-12)
    # the second list: its last two before its first, neither before the other
    ranked = [sp(-1), sp(0) + sp(1)]
    assert value("plackett_luce", beta=0.5) == pytest.approx(sum(ranked) / 2, rel=1e-12)


def test_a_list_with_nothing_scored_counts_and_says_nothing() -> None:
    lists, refs = tensors([*LISTS, [[], []]]), tensors([*REFS, [[], []]])
    got = oracle.listwise(lists, refs, [*REWARDS, [1.0, 0.0]]).item()
    assert got == pytest.approx(value("infonca") * 2 / 3, rel=1e-12)


def test_unknown_types_are_refused() -> None:
    with pytest.raises(ValueError, match="no formula for listwise's loss_type='dpo'"):
        value("dpo")
