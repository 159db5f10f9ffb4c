"""Which completions there are: of what prompts, by what seeds, and where they end.

A sampled completion depends on its prompt, the policy and its seed (`completion_seed`), and on nothing else: not on
which others are generated beside it, in what order, on how many processes, or by which engine. One limit: in other
company the logits differ in their last bits, and a token may be another one where its random number is that near to the
step between two.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from ..data.examples import Prompt
from ..policy.policy import Policy
from .ends import ends_of, named_ends
from .engines.in_process import ROWS, InProcess
from .engines.protocol import Request, Sample, Sampling

Purpose = Literal["train", "evaluation"]


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
    """Of one completion's random numbers, in 64 bits.

    seed: the run's. step: optimizer steps that are done when it is first learned from, or evaluated. row: of the data
    set. number: of the completion among those that the step has of this row.
    """
    return _seed_of(f"{purpose}/{seed}/{step}/{row}/{number}")


def _seed_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def requests_of(
    prompts: Sequence[Prompt], group: int, *, purpose: Purpose, seed: int, step: int, greedy: bool = False
) -> list[Request]:
    """For `group` completions of each prompt, and a greedy one behind them. seed, step: see `completion_seed`."""

    def seeds(prompt: Prompt) -> list[int | None]:
        first = prompt.occurrence * group
        own = [completion_seed(purpose, seed, step, prompt.row, first + k) for k in range(group)]
        return [*own, None] if greedy else [*own]

    return [Request(prompt.prompt_ids, seeds(prompt)) for prompt in prompts]


def turn_seed(seed: int | None, turn: int) -> int | None:
    """Of the random numbers of one of a completion's turns: in the first its own; None: of a greedy one."""
    return seed if seed is None or not turn else _seed_of(f"{seed}/{turn}")


def stop_ids(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> frozenset[int]:
    """What ends a completion: every EOS of the tokenizer and the checkpoint, and in conversations the token that closes
    a turn."""
    conversational = any(not isinstance(p.prompt, str) for p in prompts)
    return frozenset({*named_ends(model), *ends_of(tokenizer, conversational=conversational)})


def generate(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    rows: int = ROWS,
) -> list[Sample]:
    """One completion of each prompt, in order. seeds: of each completion's random numbers; None: greedy. rows: as
    many are generated at a time."""
    each = [None] * len(prompts) if seeds is None else seeds
    requests = [Request(prompt.prompt_ids, [seed]) for prompt, seed in zip(prompts, each, strict=True)]
    stops = stop_ids(policy.causal_lm, tokenizer, prompts)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop_ids=stops)
    return [said for (said,) in InProcess(policy, tokenizer, rows=rows).sample(requests, sampling)]
