"""What is said of an option of TRL: taken, translated, without effect, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ..errors import UserError


class Kind(StrEnum):
    """What becomes of an option."""

    TAKEN = "taken"  # an option here has the same name and meaning
    TRANSLATED = "translated"  # to another name or value
    NO_EFFECT = "without effect"  # nothing here depends on it, at this value
    REFUSED = "refused"
    ABSENT = "not in the file"  # TRL's default is another than ours, and changes the result


@dataclass(frozen=True)
class Verdict:
    """On one option. became: our options and their values. reason: a sentence, "" where none is needed."""

    key: str
    value: Any
    kind: Kind
    became: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """Verdicts on all that was given.

    method: ours ("rloo" is a loss of "grpo" here). options: for our command line, by our names. env: variables to set
    before anything is loaded. absent: what TRL would have done otherwise by default.
    """

    method: str
    options: dict[str, Any]
    env: dict[str, str]
    verdicts: list[Verdict]
    absent: list[Verdict]

    @property
    def refused(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.kind is Kind.REFUSED]

    def check(self, source: str) -> Judged:
        """Itself; UserError, with all that is refused and how many options are not, where something is. source: what
        the options stand in."""
        if not self.refused:
            return self
        lines = [f"{verdict.key}: {said(verdict.value)}: {verdict.reason}" for verdict in self.refused]
        if len(lines) == 1:
            raise UserError(f"{source}: {lines[0]}")
        others = len(self.verdicts) - len(lines)
        raise UserError("\n  ".join([f"{source}: {len(lines)} options refused, {others} accepted", *lines]))


@dataclass(frozen=True)
class Asked:
    """One option, with what its verdict may depend on.

    file: all that was given, by today's names. method: TRL's, "rloo" among them. ours: the file has options that TRL
    has not, so what both have is meant as here. gpu: whether the run has one. words: options of the command line, by
    our names, which go before the file's.
    """

    key: str
    value: Any
    file: Mapping[str, Any]
    method: str
    ours: bool = False
    gpu: bool = True
    words: Mapping[str, Any] = field(default_factory=dict)

    def taken(self, reason: str = "") -> Verdict:
        return Verdict(self.key, self.value, Kind.TAKEN, {self.key: self.value}, reason)

    def translated(self, reason: str = "", **became: Any) -> Verdict:
        return Verdict(self.key, self.value, Kind.TRANSLATED, became, reason)

    def no_effect(self, reason: str) -> Verdict:
        return Verdict(self.key, self.value, Kind.NO_EFFECT, {}, reason)

    def refused(self, reason: str) -> Verdict:
        return Verdict(self.key, self.value, Kind.REFUSED, {}, reason)

    def says(self, key: str, default: Any = None) -> Any:
        """What the command line or the file says of an option; the default where they do not, or null."""
        value = self.words.get(key, self.file.get(key))
        return default if value is None else value

    def number(self) -> float:
        """The value, which YAML reads as text where it is written as 1e-5. Raises ValueError for another."""
        if isinstance(self.value, bool):
            raise ValueError(self.value)
        return number(self.value)


def number(value: Any) -> Any:
    """An int where it is one, else a float."""
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdigit() else float(value)


def said(value: Any) -> str:
    """As YAML has it, on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(said, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {said(one)}" for key, one in value.items()) + "}"
    lines = str(value).splitlines() or [""]
    if len(lines) == 1:
        return lines[0]
    return f"{lines[0]} ..." if isinstance(value, str) else type(value).__name__
