"""An example as a person reads it: its prompt and what follows, with a name each."""

from __future__ import annotations

from typing import Any

from .types import Example

PAIR = ("chosen", "rejected", "gold")


def sample(example: Example, tokenizer: Any, turn: int = 0) -> list[tuple[str, str]]:
    """(what, text) of the prompt and of both completions of a pair, of the best and the worst of a list, or of one of
    the rollouts, which take turns."""
    chosen = list(enumerate(example.completions))
    if example.rewards is not None:
        ordered = sorted(chosen, key=lambda one: example.rewards[one[0]], reverse=True)  # type: ignore[index]
        chosen = [ordered[0], ordered[-1]]
    if example.advantages is not None:
        chosen = chosen[turn % len(chosen) :][:1]

    def name(i: int) -> str:
        if example.advantages is not None:
            given = example.advantages[i]
            one = sum(given) / max(len(given), 1) if isinstance(given, tuple) else given
            return f"advantage {one:.3g}"
        if example.rewards is not None:
            return f"reward {example.rewards[i]:.3g}"
        if len(example.completions) > 1:
            return PAIR[i]
        return {True: "desirable", False: "undesirable", None: "completion"}[example.label]

    told = [(f"row {example.row}", example.prompt_ids), *((name(i), one.ids) for i, one in chosen)]
    return [(what, tokenizer.decode(ids, skip_special_tokens=True)) for what, ids in told]
