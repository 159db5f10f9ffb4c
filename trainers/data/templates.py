"""What a tokenizer's chat template does, found by rendering small conversations with it."""

from __future__ import annotations

from typing import Any

_ANSWER = "answer"
_PROBES = (  # some templates insist on a system turn, others refuse one
    [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}],
    [
        {"role": "system", "content": "rule"},
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": _ANSWER},
    ],
)


def closing_ids(tokenizer: Any) -> list[int]:
    """The token with which the chat template closes an assistant's last turn, as a list of one id.

    Empty where there is no template, or where what follows the answer is ordinary text, at which nobody could stop.
    White space in front of the token is passed over ("answer </s>"), and what comes after it ("\\n") is no part of it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    for probe in _PROBES:
        try:
            text = tokenizer.apply_chat_template(probe, tokenize=False)
        except Exception:  # whatever this template raises, it does not render such a conversation
            continue
        _, found, tail = text.rpartition(_ANSWER)
        return _first_added_token(tokenizer, tail) if found else []
    return []


def _first_added_token(tokenizer: Any, text: str) -> list[int]:
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token in added:
            return [token]
        if tokenizer.decode([token]).strip():
            break
    return []
