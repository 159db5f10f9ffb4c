"""The largest token id and the longest sequences of examples, known without looking through them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

Found = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Extremes:
    """Of examples or prompts: (how much, the first row that has so much), -1 where there are none.

    token: the largest id. sequence: tokens of a prompt with one completion. prompt: of a prompt alone. completion: of a
    completion alone, without its row.
    """

    token: Found = (-1, -1)
    sequence: Found = (0, -1)
    prompt: Found = (0, -1)
    completion: int = 0

    def __or__(self, other: Extremes) -> Extremes:
        """Of these and then those."""
        return Extremes(
            first(self.token, other.token),
            first(self.sequence, other.sequence),
            first(self.prompt, other.prompt),
            max(self.completion, other.completion),
        )

    def in_rows(self, row: Callable[[int], int]) -> Extremes:
        """The same of rows with other numbers."""
        token, sequence, prompt = (
            (value, row(at) if at >= 0 else at) for value, at in (self.token, self.sequence, self.prompt)
        )
        return Extremes(token, sequence, prompt, self.completion)


def first(left: Found, right: Found) -> Found:
    """The greater one; the left one where they are equal."""
    return right if right[0] > left[0] else left


def extremes_of(examples: Iterable[Any]) -> Extremes:
    """Of stored examples as it was noted when they were written; others are looked through."""
    known = getattr(examples, "extremes", None)
    return known if isinstance(known, Extremes) else reduce(Extremes.__or__, map(_of, examples), Extremes())


def _of(example: Any) -> Extremes:
    completions: Sequence[Any] = getattr(example, "completions", ())
    longest = max((len(c.ids) for c in completions), default=0)
    largest = max((max(ids) for ids in (example.prompt_ids, *(c.ids for c in completions)) if ids), default=-1)
    prompt, row = len(example.prompt_ids), example.row
    return Extremes((largest, row), (prompt + longest, row), (prompt, row), longest)
