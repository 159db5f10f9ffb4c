"""transformers' own `generate`, for models whose layers keep something else than keys and values of every token.

A prompt is computed once for each of its completions, and all rows of a batch go on until the last has ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from logratio.losses import Support

from ..ends import holds_string
from .drawing import Drawing, check_finite, support_of_each, uniforms
from .protocol import Sample, Sampling


class Drawn(LogitsProcessor):
    """Leaves of each row's scores the token that `Drawing` draws, and keeps its log-probability in `logps`."""

    def __init__(self, drawing: Drawing, numbers: Tensor, mask: Tensor) -> None:
        self.drawing, self.numbers, self.mask = drawing, numbers, mask
        self.logps: list[Tensor] = []
        self.supports: list[list[Support]] = []  # of each token, those of the rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [rows, vocabulary], raw."""
        said = input_ids.clone()
        prompt = said[:, : self.mask.shape[1]]  # padding is nothing that was said: the prompt's last token stands there
        prompt[:] = torch.where(self.mask > 0, prompt, prompt[:, -1:])
        tokens, logps, kept = self.drawing(scores, self.numbers[:, len(self.logps)], said)
        self.logps.append(logps)
        self.supports += [] if kept is None else [support_of_each(kept)]
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


class StopStrings(StoppingCriteria):
    """Whether each row's text behind the prompt, `width` tokens, holds one of the strings."""

    def __init__(self, tokenizer: Any, strings: Sequence[str], width: int) -> None:
        self.tokenizer, self.strings, self.width = tokenizer, strings, width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        said = input_ids[:, self.width :].tolist()
        held = [holds_string(self.tokenizer, ids, self.strings) for ids in said]
        return torch.tensor(held, device=input_ids.device)


@contextlib.contextmanager
def plain_sampling(model: Any) -> Iterator[None]:
    """Inside, the checkpoint's own defaults (a repetition penalty, min_p, ...) do not apply: they would sample from
    another distribution than the one whose log-probs are trained."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def generated(
    model: Any, tokenizer: Any, requests: Sequence[tuple[Sequence[int], int | None]], sampling: Sampling, version: int
) -> list[Sample]:
    """A completion for each (prompt ids, seed), in one batch."""
    # nobody attends to padding, but it is looked up: some tokenizers' has no row in the embeddings
    pad = tokenizer.pad_token_id
    pad = pad if pad is not None and pad < model.config.get_text_config().vocab_size else 0
    ids, mask = padded([prompt for prompt, _ in requests], pad)
    limit = sampling.max_new_tokens
    nothing = torch.full((limit,), torch.nan, dtype=torch.float64)
    numbers = torch.stack([nothing if seed is None else uniforms(seed, limit) for _, seed in requests])
    drawn = Drawn(Drawing(sampling), numbers.to(model.device), mask.to(model.device))
    stops = StoppingCriteriaList()
    if sampling.stop_strings:
        stops.append(StopStrings(tokenizer, sampling.stop_strings, ids.shape[1]))
    with plain_sampling(model):
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=limit,
            pad_token_id=pad,
            eos_token_id=sorted(sampling.stop_ids) or None,
            do_sample=False,
            synced_gpus=False,  # each process goes on for as long as its own rows do, see `gathered`
            logits_processor=LogitsProcessorList([drawn]),
            stopping_criteria=stops,
        )
    logps = torch.stack(drawn.logps, 1)
    check_finite(logps)
    done = []
    for row, (tokens, own) in enumerate(zip(out[:, ids.shape[1] :].tolist(), logps.tolist(), strict=True)):
        end = next((i for i in range(len(tokens)) if ends(tokens, i, sampling, tokenizer)), None)
        count = len(tokens) if end is None else end + 1
        support = Support.cat([rows[row] for rows in drawn.supports[:count]]) if drawn.supports else None
        done.append(Sample(tokens[:count], "length" if end is None else "stop", own[:count], version, support))
    return done


def ends(tokens: Sequence[int], last: int, sampling: Sampling, tokenizer: Any) -> bool:
    """Whether a completion ends with the token at `last`."""
    return tokens[last] in sampling.stop_ids or holds_string(tokenizer, tokens[: last + 1], sampling.stop_strings)


def padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """[prompts, longest] token ids with padding on the left, and where they are not padding."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    left: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence(rows, padding_value=pad, **left)
    return ids, pad_sequence([torch.ones_like(row) for row in rows], **left)
