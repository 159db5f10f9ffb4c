"""Completions of prompts, greedy or sampled, each by random numbers of its own.

A sampled completion depends on its prompt, the policy and its seed (`completion_seed`), and on nothing else: not on
which others are generated beside it, in what order, or on how many processes. One limit: where a batch pads a prompt
otherwise, the logits differ in their last bits, and a token that was as good as tied may be another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from ..data.examples import Prompt
from ..policy.policy import Policy
from ..policy.reference import inference
from .ends import ends_of, named_ends

GENERATION_ROWS = 256
"""Completions generated at a time: memory and speed, not what is said."""

Purpose = Literal["train", "evaluation"]


@dataclass(frozen=True)
class Sampled:
    """token ids with the EOS that ended them; `ended` is False where max_completion_length cut them."""

    ids: list[int]
    ended: bool


def numbered(prompts: Sequence[Prompt]) -> list[Prompt]:
    """A step's prompts, all processes', with the occurrences of each row told apart."""
    seen: Counter[int] = Counter()
    out = []
    for prompt in prompts:
        again = seen[prompt.row]
        out.append(dataclasses.replace(prompt, occurrence=again) if again else prompt)
        seen[prompt.row] += 1
    return out


def completion_seed(purpose: Purpose, seed: int, step: int, row: int, number: int) -> int:
    """Of one completion's random numbers, in 64 bits (of which torch's generator on a CPU takes the lower 32).

    seed: the run's. step: optimizer steps done so far. row: of the data set. number: of the completion among those that
    the step has of this row.
    """
    name = f"{purpose}/{seed}/{step}/{row}/{number}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


class OwnStreams(LogitsProcessor):
    """Perturbs scores so that their argmax is a sample from softmax(scores / temperature), cut to `top_p`.

    Gumbel-max: with E exponential, argmax_v (s_v - log E_v) is v with probability softmax(s)_v. In float64, since a
    float32 draw is 0 once in 2^24 times, which would let any token of a large vocabulary win now and then.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, *, temperature: float, top_p: float) -> None:
        self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [rows, vocabulary], raw; returns float64."""
        scores = scores / self.temperature
        if self.top_p is not None:
            scores = self.top_p(input_ids, scores)
        noise = torch.empty_like(scores, dtype=torch.float64)
        for row, stream in zip(noise, self.streams, strict=True):
            row.exponential_(generator=stream)
        return noise.log_().neg_().add_(scores)


@contextlib.contextmanager
def plain_sampling(model: Any) -> Iterator[None]:
    """Inside, the checkpoint's own defaults (a repetition penalty, min_p, ...) do not apply: they would sample from
    another distribution than the one whose log-probs are trained."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


@torch.no_grad()
def generate(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    rows: int = GENERATION_ROWS,
) -> list[Sampled]:
    """One completion of each prompt, in order. seeds: of each completion's random numbers; None: greedy. rows: as
    many are generated at a time.

    It ends with the first EOS of the tokenizer or the checkpoint, or the token that closes a turn of a conversation.
    """
    device = next(policy.parameters()).device
    conversational = any(not isinstance(p.prompt, str) for p in prompts)
    stops = {*named_ends(policy.causal_lm), *ends_of(tokenizer, conversational=conversational)}
    # nobody attends to padding, but it is looked up: some tokenizers' has no row in the embeddings
    pad = tokenizer.pad_token_id
    pad = pad if pad is not None and pad < policy.causal_lm.config.get_text_config().vocab_size else 0
    done: list[Sampled] = []
    for start in range(0, len(prompts), rows):
        here = slice(start, start + rows)
        ids, mask = padded(prompts[here], pad)
        chosen = LogitsProcessorList()
        if seeds is not None:
            chosen.append(OwnStreams(seeds[here], device, temperature=temperature, top_p=top_p))
        with inference(policy), plain_sampling(policy.causal_lm):
            out = policy.causal_lm.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=sorted(stops) or None,
                do_sample=False,
                synced_gpus=False,  # each process goes on for as long as its own rows do, see `gathered`
                logits_processor=chosen,
            )
        for tokens in out[:, ids.shape[1] :].tolist():
            end = next((i for i, token in enumerate(tokens) if token in stops), None)
            done.append(Sampled(tokens if end is None else tokens[: end + 1], end is not None))
    return done


def padded(prompts: Sequence[Prompt], pad: int) -> tuple[Tensor, Tensor]:
    """[prompts, longest] token ids with padding on the left, and where they are not padding."""
    width = max(len(p.prompt_ids) for p in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.prompt_ids) :] = torch.tensor(prompt.prompt_ids)
        mask[row, width - len(prompt.prompt_ids) :] = 1
    return ids, mask
