"""Hold a trainer to the laws, and look for the smallest rows that break one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from .._verdicts import Broken, LawViolation, NotAsked, Report
from . import laws as _laws  # noqa: F401  it fills the book
from .book import LAWS, Asking, Case, Law
from .trained import KINDS, Trained


def check_trainer(
    fn: Callable[..., Trained],
    kind: str = "sequence",
    *,
    micro_batch_size: int = 1,
    loss_at_start: float | None = None,
    laws: Collection[str] | None = None,
    skip: Collection[str] = (),
    rtol: float | None = None,
    shrink_runs: int = 40,
) -> Report:
    """Hold a trainer to the laws; raise `LawViolation` for the first that it breaks.

    kind: of its rows, see `make_rows`. micro_batch_size: the smallest that it takes; KTO may take none of one row.
    loss_at_start: what its first loss is whatever the rows, such as ln 2. laws:
    only these. skip: all but these, for a trainer that means to break them. rtol: how far two runs may be apart that
    should be one, relative to the longer gradient or update; by default what the weights' dtype takes. shrink_runs: at
    most so many runs in search of the smallest rows. Raises ValueError for a law in `laws` that cannot be asked.
    """
    report = Report()
    for name, verdict in verdicts(
        fn,
        kind,
        micro_batch_size=micro_batch_size,
        loss_at_start=loss_at_start,
        laws=laws,
        skip=skip,
        rtol=rtol,
        shrink_runs=shrink_runs,
        report=report,
    ):
        if isinstance(verdict, LawViolation):
            raise verdict
        if verdict is None:
            report.held.append(name)
        else:
            if laws is not None:
                raise ValueError(f"{name} cannot be asked: {verdict}")
            report.not_asked[name] = verdict
    return report


def verdicts(
    fn: Callable[..., Trained],
    kind: str = "sequence",
    *,
    micro_batch_size: int = 1,
    loss_at_start: float | None = None,
    laws: Collection[str] | None = None,
    skip: Collection[str] = (),
    rtol: float | None = None,
    shrink_runs: int = 40,
    report: Report | None = None,
) -> Iterator[tuple[str, LawViolation | str | None]]:
    """(law, None where it is kept, the violation, or why it is not asked), law by law; arguments of `check_trainer`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    unknown = {*(laws or ()), *skip} - {*LAWS}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: the laws are {', '.join(LAWS)}")
    ask = Asking(fn, kind, loss_at_start, rtol)
    for name, one in LAWS.items():
        if name in (LAWS if laws is None else laws):
            yield name, "skipped" if name in skip else _verdict(ask, one, micro_batch_size, shrink_runs)
            if report is not None:
                report.runs = ask.runs


def _verdict(ask: Asking, one: Law, micro_batch_size: int, shrink_runs: int) -> LawViolation | str | None:
    case = one.case.cut_into(micro_batch_size)
    try:
        one.check(ask, case)
    except NotAsked as reason:
        return str(reason)
    except Broken as broken:
        case, detail = _smallest(ask, one, case, str(broken), shrink_runs)
        return LawViolation(one.name, f"{one.statement}\n  {detail}\n{ask.show(case)}")
    return None


def _smallest(ask: Asking, one: Law, case: Case, detail: str, shrink_runs: int) -> tuple[Case, str]:
    """The smallest case that breaks the law, going from one to a smaller one; and how it does."""
    until = ask.runs + shrink_runs
    for smaller in case.smaller(one.fewest):
        if ask.runs >= until:
            break
        try:
            one.check(ask, smaller)
        except Broken as broken:
            return _smallest(ask, one, smaller, str(broken), until - ask.runs)
        except Exception:  # what the trainer does not take is no smaller example
            continue
    return case, detail
