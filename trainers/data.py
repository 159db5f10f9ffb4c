"""Rows of a data set become `Example`s: a prompt's token ids and those of its completions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logratio.losses import Kind

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Completion:
    """Token ids that follow a prompt. scored: which of them the loss sees, same length; None: all of them."""

    ids: list[int]
    scored: list[bool] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """What every method trains on: a prompt and its completions.

    prompt_ids: never empty, so that every scored token has a predecessor.
    completions: one (SFT, KTO), or chosen and rejected (DPO, ORPO). Never without a scored token.
    label: True where the completion is desirable (KTO).
    row: index in the data set, for messages.
    """

    prompt_ids: list[int]
    completions: list[Completion]
    label: bool | None = None
    row: int = -1


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to generate from (GRPO).

    prompt: as the data set has it, text or messages; rewards are called with it.
    columns: the row's further columns, handed to rewards by name.
    """

    prompt_ids: list[int]
    prompt: str | Messages
    columns: dict[str, Any]
    row: int = -1


@dataclass(frozen=True)
class Rows:
    """A data set's rows and the name that messages call it by. lines: each row's line number in a JSON-lines file."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    lines: list[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    def where(self, row: int) -> str:
        return f"{self.name}, line {self.lines[row]}" if self.lines else f"{self.name}, row {row} (counted from 0)"


@dataclass
class Report:
    """What became of the rows; `str(report)` is one line. Counts are of examples unless said otherwise."""

    name: str
    examples: int = 0
    tokens: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    dropped: int = 0
    identical: int = 0
    moved: int = 0


def load_rows(dataset_name: str, kind: Kind, *, split: str = "train", config: str | None = None) -> Rows:
    """The rows of the embedded task `arithmetic`, of a local file or folder, or of a data set of the Hub."""
    raise NotImplementedError


def prepare(
    rows: Rows,
    kind: Kind,
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
) -> tuple[list[Example], Report]:
    """Tokenize rows of sequences, pairs or labeled completions."""
    raise NotImplementedError


def prepare_prompts(rows: Rows, tokenizer: Any, *, max_length: int | None = None) -> tuple[list[Prompt], Report]:
    """Tokenize prompts to generate from; one that fills `max_length` is dropped and counted."""
    raise NotImplementedError
