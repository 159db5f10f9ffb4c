"""Checked rows and their token ids, a thousand at a time; a row that cannot be tokenized is found among them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from logratio.losses import Kind

from ..errors import UserError
from .columns import Source, read_sources
from .layout import Layout
from .report import BadRows
from .tokenization import Encoder, with_eos

BATCH = 1000  # rows tokenized by one call, which uses all cores

Tokenized = tuple[Source, list[int] | None, list[list[int]]]


def tokenized(
    encoder: Encoder, bad: BadRows, layout: Layout, start: int = 0, stop: int | None = None
) -> Iterator[Tokenized]:
    """Every usable row with the ids of its prompt alone (None: it has none) and of its prompt with each completion.

    Raises UserError at the first row that is not, after all before it, however many are tokenized at a time.
    """
    sources = read_sources(bad, layout, start, stop)
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
            done = _tokenize(encoder, batch, bad, layout)
        except UserError:
            yield from _one_by_one(encoder, batch, bad, layout)
        else:
            yield from done
    if ended is not None:
        raise ended


def _one_by_one(encoder: Encoder, batch: list[Source], bad: BadRows, layout: Layout) -> Iterator[Tokenized]:
    """The same, to find out whose error it was."""
    for source in batch:
        try:
            (done,) = _tokenize(encoder, [source], bad, layout)
        except UserError as error:
            bad.take(error, source.row)
        else:
            yield done


def _tokenize(encoder: Encoder, batch: list[Source], bad: BadRows, layout: Layout) -> list[Tokenized]:
    where = bad.rows.where
    with_prompt = [source for source in batch if source.prompt is not None]
    prompts = encoder.prompts(
        [source.prompt for source in with_prompt if source.prompt is not None],
        [source.options for source in with_prompt],
        [where(source.row) for source in with_prompt],
        to_generate=layout.kind == Kind.GROUPED,
    )
    pieces = [(whole, source) for source in batch for whole in whole_texts(source, encoder.tokenizer)]
    wholes = iter(
        encoder.wholes(
            [whole for whole, _ in pieces],
            [source.options for _, source in pieces],
            [where(source.row) for _, source in pieces],
        )
    )
    alone: list[Any] = list(prompts) if with_prompt else [None] * len(batch)
    return [
        (source, prompt, [next(wholes) for _ in source.completions])
        for source, prompt in zip(batch, alone, strict=True)
    ]


def whole_texts(source: Source, tokenizer: Any) -> list[Any]:
    """The prompt with each of its completions, in one piece; EOS closes plain text only."""
    prompt: Any = source.prompt
    return [
        (prompt or "") + with_eos(completion, tokenizer) if isinstance(completion, str) else (prompt or []) + completion
        for completion in source.completions
    ]
