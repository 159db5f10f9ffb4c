"""What is said of the words of a command line that are no options of ours: what of TRL's becomes of them, or what was
meant."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from logratio.losses import Loss

from .judging import OF_OTHERS, REASONS, consider, nobodys
from .rules import RULES
from .table import ONLY, RENAMED
from .verdicts import Kind, Verdict, said


def about_words(
    method: str,
    loss: type[Loss],
    unknown: Mapping[str, Sequence[str]],
    known: Collection[str],
    words: Mapping[str, Any],
) -> list[str]:
    """A line for each of the unknown options, and one for those of TRL how a file of them is read.

    unknown: option -> its values. known: all options that there are. words: those of the command line that are known.
    """
    given = {name: value_of(values) for name, values in unknown.items()}
    judged = {one.key: one for one in consider(method, given, loss=loss, words=words).verdicts}
    theirs = [name for name in unknown if is_trls(name) and not judged[name].reason.startswith(OF_OTHERS)]
    lines = [
        f"--{name}: {verdict_in_words(judged[name]) if name in theirs else meant(judged[name], known)}"
        for name in unknown
    ]
    return lines + (["a file with TRL's options is taken by --config FILE"] if theirs else [])


def is_trls(name: str) -> bool:
    today = RENAMED.get(name, name)
    return any(today in names for names in (RULES, ONLY, REASONS))


def value_of(values: Sequence[str]) -> Any:
    """As it would stand in a file; an option without a value is a flag."""
    try:
        read = [yaml.safe_load(value) for value in values]
    except yaml.YAMLError:
        read = list(values)
    return True if not read else read[0] if len(read) == 1 else read


def verdict_in_words(verdict: Verdict) -> str:
    """On an option of TRL."""
    because = f" ({verdict.reason})" if verdict.reason else ""
    if verdict.kind is Kind.NO_EFFECT:
        return f"TRL's, without effect here{because}: leave it out"
    if verdict.kind is Kind.REFUSED:
        return f"TRL's, refused: {verdict.reason}"
    ours = " ".join(as_words(name, value) for name, value in verdict.became.items())
    return f"TRL's, here {ours or 'what happens anyway'}{because}"


def as_words(name: str, value: Any) -> str:
    """An option of ours on the command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    if isinstance(value, list | tuple):
        return " ".join([f"--{name}", *map(str, value)])
    return f"--{name} {said(value)}"


def meant(verdict: Verdict, known: Collection[str]) -> str:
    """On an option that neither has with this method: the nearest of ours, where one is near."""
    return verdict.reason if verdict.reason.startswith(OF_OTHERS) else nobodys(verdict.key, known, 1, "--")
