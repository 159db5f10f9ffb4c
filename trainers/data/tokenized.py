"""Checked rows and their token ids, a thousand at a time; a row that cannot be tokenized is found among them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from logratio.losses import Kind

from ..errors import UserError
from .columns import Layout, Source, read_sources
from .report import BadRows
from .tokenization import Encoder, with_eos

BATCH = 1000  # rows tokenized by one call, which uses all cores

Tokenized = tuple[Source, list[int] | None, list[list[int]]]


def tokenized(encoder: Encoder, bad: BadRows, layout: Layout) -> Iterator[Tokenized]:
    """Every usable row with the ids of its prompt alone (None: it has none) and of its prompt with each completion."""
    sources = read_sources(bad, layout)
    while batch := list(islice(sources, BATCH)):
        try:
            yield from _tokenize(encoder, batch, bad, layout)
            continue
        except UserError:
            if not bad.skip:
                raise
        for source in batch:  # one by one, to find out whose error it was
            try:
                yield from _tokenize(encoder, [source], bad, layout)
            except UserError as error:
                bad.take(error, source.row)


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
