"""Fewer cases for what is tested by default: those in which everything meets everything once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logratio.benchmarks.peers.case import Case


def covering(has: Sequence[set[Any]], chosen: Iterable[int] = ()) -> list[int]:
    """Numbers of sets, `chosen` among them, that have together what all have; one after the other the most useful."""
    found = set(chosen)
    missing = set().union(*has) - set().union(*(has[i] for i in found))
    while missing:
        best = max(range(len(has)), key=lambda i: (len(has[i] & missing), -i))
        found.add(best)
        missing -= has[best]
    return sorted(found)


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """So many of the axes' product that every two values of two axes meet in one."""
    rows = list(product(*(list(axis) for axis in axes)))
    places = list(product(*(range(len(list(axis))) for axis in axes)))
    return [rows[i] for i in covering([set(combinations(enumerate(place), 2)) for place in places])]


def traits(case: Case) -> list[tuple[str, Any]]:
    """What a case consists of: its loss type, and each option with its value."""
    own = {
        "weighted": case.weighted,
        "sampled": case.sampled,
        "by_token": case.by_token,
        "kept": case.kept,
    } | case.options
    kind = (case.method, own.pop("loss_type", None))
    return [("loss_type", kind), *((name, value) for name, value in own.items() if value)]


def enough(cases: Sequence[Case], together: int) -> list[Case]:
    """The plain ones, and so many others that each trait (together = 1), or each two of a case (2), are in one."""
    has = [
        {frozenset(some) for size in range(1, together + 1) for some in combinations(traits(case), size)}
        for case in cases
    ]
    alone = [i for i, case in enumerate(cases) if len(traits(case)) == 1]  # a loss type
    return [cases[i] for i in covering(has, alone)]
