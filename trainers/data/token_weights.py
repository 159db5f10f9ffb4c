"""What each token of a sequence weighs in the loss: the column `weight`, times the key `weight` of an assistant's turn.

A row's weight is that of all its tokens. A message's (0 or 1 in OpenAI's format for fine-tuning, any number from 0 on
here) multiplies what the chat template marks of that turn, so the template has to mark every turn.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from ..errors import UserError
from .columns import checked_weight
from .tokenization import Text


def has_weights(text: Text) -> bool:
    """Whether a message of a conversation has a weight of its own."""
    return not isinstance(text, str) and any(message.get("weight") is not None for message in text)


def token_weights(
    row_weight: float, text: Text, mask: list[bool] | None, length: int, place: str
) -> list[float] | None:
    """The weights of the row's `length` tokens, or None where all are 1.

    mask: for each token whether it is the assistant's; needed where messages have weights. place: begins errors.
    """
    weights = [row_weight] * length
    if has_weights(text):
        assert mask is not None
        turns = _turn_weights(text, place)
        marked = [list(run) for own, run in groupby(range(length), key=lambda i: mask[i]) if own]
        if len(marked) != len(turns):
            raise UserError(
                f"{place} has weights in its messages, but the chat template marks {len(marked)} of its {len(turns)} "
                "assistant's turns with {% generation %} ... {% endgeneration %}: use a template that marks each"
            )
        for run, weight in zip(marked, turns, strict=True):
            for i in run:
                weights[i] *= weight
    return None if all(weight == 1 for weight in weights) else weights


def _turn_weights(messages: Any, place: str) -> list[float]:
    """The weight of each assistant's turn."""
    weights = []
    for index, message in enumerate(messages):
        value, role = message.get("weight"), message["role"]
        if role == "assistant":
            weights.append(1.0 if value is None else checked_weight(value, f"{place}, message {index}"))
        elif value is not None:
            raise UserError(
                f"{place}, message {index} has a 'weight', but its role is {role!r}: only an assistant's may"
            )
    return weights
