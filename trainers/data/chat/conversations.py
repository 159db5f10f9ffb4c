"""Conversations in the shapes that data sets give them: JSON in a string, and ShareGPT's `from` and `value`; and what
a chat template is given beside them.

ShareGPT's roles become those that chat templates know: human is the user, gpt the assistant, an observation what a tool
said, and a function_call an assistant's turn that calls one. Other names are refused: nobody knows whose turn it is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from ...errors import UserError, shown
from ..files import parse_json
from .messages import without_nulls

# Deeper than any message, tool or schema; what handles a row further on is recursive, and would fail in its own words.
DEEPEST = 64
LARGEST = 10**4000  # Python writes no longer integers as text
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_PYTHON_LIST = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:.*\}\s*\]\s*", re.DOTALL)


def messages_in(text: str) -> list[Any] | None:
    """The messages that the text is JSON of; None where it is any other text, in brackets or not."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return None
    try:
        found = parse_json(stripped)
    except ValueError:
        return None
    return found if found and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in found) else None


def is_written_out(text: Any) -> bool:
    """Whether the text is a list of messages, in JSON or as Python prints one."""
    return isinstance(text, str) and (messages_in(text) is not None or _PYTHON_LIST.fullmatch(text) is not None)


def as_messages(value: Any, place: str) -> Any:
    """A cell of a conversational data set as messages with role and content; as it is where it is no such thing.

    place: where the cell is, for errors.
    """
    if isinstance(value, str):
        value = messages_in(value) or value
    if isinstance(value, dict) and ("role" in value or "from" in value):  # one turn, as a completion
        value = [value]
    if not isinstance(value, list):
        return value
    return [_turn(m, f"{place}, message {i}") if _is_sharegpt(m) else m for i, m in enumerate(value)]


def with_system(messages: Any, system: Any, place: str) -> Any:
    """The messages behind the system turn that ShareGPT's column `system` holds."""
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise UserError(f"{place}: 'system' must be text, got {shown(system)}")
    turn = {"role": "system", "content": system}
    if not isinstance(messages, list) or messages[:1] == [turn]:
        return messages
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        raise UserError(f"{place} has a column 'system' and another system turn in its conversation: leave one out")
    return [turn, *messages]


def check_media(row: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a row with pictures or sounds, of text too: the model would not get what it speaks of."""
    for column in MEDIA:
        value = row.get(column)
        if value is not None and (not hasattr(value, "__len__") or len(value)):  # arrays have no truth
            raise UserError(f"{where} has {column!r}, but models are trained on text alone: remove the column")


def template_options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the row's `tools` and `chat_template_kwargs` give its chat template; without nulls, as messages."""
    tools = _option(row, "tools", list, "a list of tools", where)
    for tool in tools:
        if not isinstance(tool, dict):
            raise UserError(f"{where}: 'tools' must be a list of tools, each an object, got {shown(tool)} in it")
    options = _option(row, "chat_template_kwargs", dict, "an object of options for the chat template", where)
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name in callers_options():
            raise UserError(
                f"{where}: 'chat_template_kwargs' has {name!r}, which is not the row's to set"
                + (": give them in a column of their own" if name == "tools" else ": leave it out")
            )
    documents = options.get("documents", [])
    if not isinstance(documents, list) or not all(isinstance(document, dict) for document in documents):
        raise UserError(
            f"{where}: 'documents' in 'chat_template_kwargs' must be a list of objects, got {shown(documents)}"
        )
    return without_nulls({**options, "tools": tools} if tools else options)


def check_value(value: Any, place: str) -> None:
    """Raise UserError for what no template and no tokenizer takes: half a surrogate pair, endless nesting or digits."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item, place)
            elif isinstance(item, dict):
                if not all(isinstance(key, str) for key in item):
                    raise UserError(f"{place} has an object with a key that is no text: {shown(item)}")
                below += item
                below += item.values()
            elif isinstance(item, (list, tuple)):
                below += item
            elif isinstance(item, int) and not -LARGEST < item < LARGEST:
                raise UserError(f"{place} has a number of too many digits")
        if not below:
            return
        level = below
    raise UserError(f"{place} is nested more than {DEEPEST} levels deep")


def _check_text(text: str, place: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place} has half of a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start}, which "
            "is no text: the other half of the character was cut off; mend or remove the row"
        ) from None


def _is_sharegpt(message: Any) -> bool:
    return isinstance(message, dict) and "role" not in message and "from" in message and "value" in message


def _turn(message: dict[str, Any], place: str) -> dict[str, Any]:
    name, value = message["from"], message["value"]
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{place} is from {shown(name)}, expected one of {', '.join(ROLES)}")
    others = {key: other for key, other in message.items() if key not in ("from", "value")}
    if name == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls(value, place), **others}
    return {"role": role, "content": value, **others}


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    """The calls that a function_call's value, an object or a list of them, perhaps in JSON, makes."""
    try:
        calls = parse_json(value) if isinstance(value, str) else value
    except ValueError:
        calls = None
    calls = [calls] if isinstance(calls, dict) else calls
    if (
        not isinstance(calls, list)
        or not calls
        or not all(isinstance(c, dict) and {"name", "arguments"} <= c.keys() for c in calls)
    ):
        raise UserError(
            f"{place} is a function_call that is no JSON object with 'name' and 'arguments', got {shown(value)}"
        )
    return [{"type": "function", "function": call} for call in calls]


@cache
def callers_options() -> frozenset[str]:
    """Parameters of apply_chat_template that say how it is called here, not what the template is given."""
    from transformers import PreTrainedTokenizerBase

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset({*parameters, "messages"} - {"documents", "kwargs"})


def _option(row: Mapping[str, Any], column: str, wanted: type, what: str, where: str) -> Any:
    """The column's value, perhaps out of JSON in a string; empty where there is none."""
    value, place = row.get(column), f"{where}: {column!r}"
    if value is None:
        return wanted()
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else wanted()
        except ValueError as error:
            raise UserError(f"{place} is not valid JSON: {getattr(error, 'msg', error)}") from None
        if value is None:
            return wanted()
    if not isinstance(value, wanted):
        raise UserError(f"{place} must be {what}, got {shown(value)}")
    check_value(value, place)
    return value
