"""Where a judgement that depends on the value, the method or the other options is entered under its option's names."""

from __future__ import annotations

from collections.abc import Callable

from .verdicts import Asked, Verdict

Rule = Callable[[Asked], Verdict]
RULES: dict[str, Rule] = {}
"""option -> its judgement. They go before everything else that is known of the option."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Function decorator: enter a judgement under these options. Its docstring is what the documents say of it."""

    def add(judgement: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = judgement
        return judgement

    return add
