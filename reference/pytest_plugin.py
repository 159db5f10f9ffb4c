"""The pytest plugin `logratio_laws`: its one fixture, `laws`, holds what is yours to the laws.

    def test_my_loss(laws):
        laws.check_loss(MyLoss)

Loaded in every pytest run where the package is installed, so it imports nothing before it is asked to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ._verdicts import Report

NOT_ASKED = "law not asked"


class Laws:
    """The checks of `logratio.reference.laws`, with their arguments. A violation fails the test with its message alone;
    what could not be asked stands in the run's summary."""

    def __init__(self, node: pytest.Item) -> None:
        self._node = node

    def check_loss(self, loss: Any, **options: Any) -> None:
        """loss: an object, or a class whose options all have defaults."""
        from .laws import check_loss

        self._held(check_loss, loss() if isinstance(loss, type) else loss, **options)

    def check_trainer(self, fn: Callable[..., Any], kind: str = "sequence", **options: Any) -> Report:
        from .trainer_laws import check_trainer

        return self._held(check_trainer, fn, kind, **options)

    def check_advantage(self, fn: Callable[..., Any], **options: Any) -> Report:
        from .function_laws import check_advantage

        return self._held(check_advantage, fn, **options)

    def check_kernel(self, fn: Callable[..., Any], **options: Any) -> Report:
        from .function_laws import check_kernel

        return self._held(check_kernel, fn, **options)

    def _held(self, check: Callable[..., Any], *args: Any, **options: Any) -> Any:
        from ._verdicts import LawViolation

        broken = None
        try:
            report = check(*args, **options)
        except LawViolation as violation:
            broken = violation
        if broken is not None:  # behind the except, or pytest shows both
            pytest.fail(f"LawViolation: {broken}", pytrace=False)
        for name, reason in (report.not_asked if report is not None else {}).items():
            self._node.user_properties.append((NOT_ASKED, f"{name}: {reason}"))
        return report


@pytest.fixture
def laws(request: pytest.FixtureRequest) -> Laws:
    """`laws.check_loss(MyLoss)`, `check_trainer`, `check_advantage`, `check_kernel`."""
    return Laws(request.node)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say which laws were not asked, and why."""
    lines = [
        f"{report.nodeid}: {said}"
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, said in report.user_properties
        if name == NOT_ASKED
    ]
    if lines:
        terminalreporter.section("laws not asked")
        for line in lines:
            terminalreporter.line(line)
