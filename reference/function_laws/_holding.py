"""One law after the other, and the first that is broken; what both checks share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from .._verdicts import Broken, LawViolation, NotAsked, Report


def hold(
    laws: Mapping[str, Callable[..., None]], asking: Any, only: Collection[str] | None, skip: Collection[str]
) -> Report:
    """Call each law with `asking`; raise LawViolation for the first that is broken, ValueError for one in `only` that
    cannot be asked."""
    unknown = {*(only or ()), *skip} - {*laws}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: the laws are {', '.join(laws)}")
    report = Report()
    for name, law in laws.items():
        if only is not None and name not in only:
            continue
        try:
            if name in skip:
                raise NotAsked("skipped")
            law(asking)
            report.held.append(name)
        except NotAsked as reason:
            if only is not None:
                raise ValueError(f"{name} cannot be asked: {reason}") from None
            report.not_asked[name] = str(reason)
        except Broken as broken:
            statement = " ".join((law.__doc__ or "").split("\n\n")[0].split())
            raise LawViolation(name, f"{statement}\n  {broken}") from None
    return report


def taken(fn: Callable[..., Any], names: Collection[str]) -> set[str]:
    """Those of the names that are arguments of `fn`."""
    parameters = inspect.signature(fn).parameters
    return {name for name in names if name in parameters}
