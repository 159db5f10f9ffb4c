"""What comes of asking something for its laws: all are held, one is broken, some cannot be asked."""

from __future__ import annotations

from dataclasses import dataclass, field


class LawViolation(AssertionError):
    """A law is broken; the message names the law, states it, and shows the smallest example found."""

    def __init__(self, law: str, message: str) -> None:
        super().__init__(f"{law}: {message}")
        self.law = law


class Broken(AssertionError):
    """Inside a check: the law is broken; says by how much."""


class NotAsked(Exception):
    """Inside a check: the law cannot be asked of this; says why."""


@dataclass
class Report:
    """held: the laws that are kept. not_asked: those that could not be asked, and why. runs: of a trainer."""

    held: list[str] = field(default_factory=list)
    not_asked: dict[str, str] = field(default_factory=dict)
    runs: int = 0

    def __str__(self) -> str:
        runs = f" ({self.runs} runs)" if self.runs else ""
        lines = [f"held: {', '.join(self.held) or 'none'}{runs}"]
        return "\n".join([*lines, *(f"not asked: {name}: {reason}" for name, reason in self.not_asked.items())])
