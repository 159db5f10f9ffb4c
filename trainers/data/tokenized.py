"""Checked rows and their token ids, a thousand at a time; a row that cannot be tokenized is found among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from logratio.losses import Kind

from ..errors import UserError
from .columns import Source, read_sources
from .layout import Layout
from .report import Report
from .tokenization import Encoder, Piece, with_eos

BATCH = 1000  # rows tokenized by one call, which uses all cores

Tokenized = tuple[Source, list[int] | None, list[list[int]]]


def tokenized(
    encoder: Encoder, report: Report, layout: Layout, start: int = 0, stop: int | None = None
) -> Iterator[Tokenized]:
    """Every usable row with the ids of its prompt alone (None: it has none) and of its prompt with each completion.

    Raises UserError at the first row that is not, after all before it, however many are tokenized at a time.
    """
    sources = read_sources(report, layout, start, stop)
    ended: UserError | None = None
    while ended is None:
        batch: list[Source] = []
        try:
            for source in islice(sources, BATCH):
                batch.append(source)
        except UserError as error:
            ended = error
        if not batch:
            break
        try:
            done = _tokenize(encoder, batch, report, layout)
        except UserError:
            yield from _one_by_one(encoder, batch, report, layout)
        else:
            yield from done
    if ended is not None:
        raise ended


def _one_by_one(encoder: Encoder, batch: list[Source], report: Report, layout: Layout) -> Iterator[Tokenized]:
    """The same, to find out whose error it was."""
    for source in batch:
        try:
            (done,) = _tokenize(encoder, [source], report, layout)
        except UserError as error:
            report.take(error, source.row)
        else:
            yield done


def _tokenize(encoder: Encoder, batch: list[Source], report: Report, layout: Layout) -> list[Tokenized]:
    def pieces(texts: Callable[[Source], list[Any]]) -> list[Piece]:
        return [
            Piece(text, source.options, report.rows.where(source.row)) for source in batch for text in texts(source)
        ]

    prompts: list[Any] = [None] * len(batch)
    if batch[0].prompt is not None:
        prompts = encoder.prompts(pieces(lambda source: [source.prompt]), to_generate=layout.kind == Kind.GROUPED)
    wholes = iter(encoder.wholes(pieces(lambda source: whole_texts(source, encoder.tokenizer))))
    return [
        (source, prompt, [next(wholes) for _ in source.completions])
        for source, prompt in zip(batch, prompts, strict=True)
    ]


def whole_texts(source: Source, tokenizer: Any) -> list[Any]:
    """The prompt with each of its completions, in one piece; EOS closes plain text only."""
    prompt: Any = source.prompt
    return [
        (prompt or "") + with_eos(completion, tokenizer) if isinstance(completion, str) else (prompt or []) + completion
        for completion in source.completions
    ]
