"""Fewer cases for what is tested by default of each: the others are there in the long form of the same test."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from logratio.benchmarks.peers.cases import Case


def traits(case: Case) -> list[tuple[str, Any]]:
    """What a case consists of: its loss type, and each option with its value."""
    own = {"weighted": case.weighted, "sampled": case.sampled} | case.options
    kind = (case.method, own.pop("loss_type", None))
    return [("loss_type", kind), *((name, value) for name, value in own.items() if value)]


def enough(cases: Sequence[Case], together: int) -> list[Case]:
    """The plain ones, and so many others that each trait (together = 1), or each two of a case (2), are in one."""
    has = [
        {frozenset(some) for size in range(1, together + 1) for some in combinations(traits(case), size)}
        for case in cases
    ]
    missing: set[frozenset[tuple[str, Any]]] = set().union(*has)
    chosen: set[int] = set()
    chosen |= {i for i, case in enumerate(cases) if len(traits(case)) == 1}  # a loss type alone
    missing -= set().union(*(has[i] for i in chosen))
    while missing:
        best = max(range(len(cases)), key=lambda i: (len(has[i] & missing), -i))
        chosen.add(best)
        missing -= has[best]
    return [case for i, case in enumerate(cases) if i in chosen]
