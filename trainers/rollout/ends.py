"""The tokens with which a completion ends: where rollouts stop, and what the saved model says of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from ..data.chat.templates import closing_ids
from ..data.examples import Example, Prompt

_MARGIN = 8
_LOOKED_AT = 1000  # examples that show how training ends its completions


def named_ends(model: Any) -> list[int]:
    """The EOS tokens of the model's generation_config."""
    config = getattr(model, "generation_config", None)
    named = None if config is None else config.eos_token_id
    return [] if named is None else list(named) if isinstance(named, list | tuple) else [named]


def ends_of(tokenizer: Any, *, conversational: bool) -> list[int]:
    """The tokenizer's EOS, and in conversations the token that its chat template closes an assistant's turn with."""
    ends = [tokenizer.eos_token_id, *(closing_ids(tokenizer) if conversational else ())]
    return list(dict.fromkeys(end for end in ends if end is not None))


def holds_string(tokenizer: Any, ids: Sequence[int], strings: Sequence[str]) -> bool:
    """Whether the text of these tokens holds one of the strings, which that of all but the last did not.

    A token is a byte at least, so only as many of the last ones are read as the longest string has bytes, and some more
    for those that are no text, or begin another way at the start of one.
    """
    if not strings:
        return False
    tail = ids[-(max(len(s.encode()) for s in strings) + _MARGIN) :]
    text = tokenizer.decode(tail, skip_special_tokens=False)
    return any(s in text for s in strings)


def name_ends(model: Any, tokenizer: Any, data: Sequence[Example | Prompt]) -> list[str]:
    """Enter into the model's generation_config every end that training teaches, and say which those are.

    Else the trained model would go on behind it: a base model's names the end of a document, and a chat template
    closes a turn with another token.
    """
    if getattr(model, "generation_config", None) is None:
        return []
    named = named_ends(model)
    new = [end for end in ends_of(tokenizer, conversational=True) if end not in named and _taught(end, tokenizer, data)]
    if not new:
        return []
    ends = [*named, *new]
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    tokens = " and ".join(map(str, tokenizer.convert_ids_to_tokens(new)))
    return [f"completions end with {tokens}, which the model's generation_config did not name; it does now"]


def _taught(end: int, tokenizer: Any, data: Sequence[Example | Prompt]) -> bool:
    first = data[0] if data else None
    if isinstance(first, Prompt):
        return end in ends_of(tokenizer, conversational=not isinstance(first.prompt, str))
    return any(end in c.ids for e in islice(data, _LOOKED_AT) if isinstance(e, Example) for c in e.completions)
