"""Messages in the form that chat templates know, however the file had them: arguments decoded, and without nulls.

Arrow gives every object of a column the keys of all the others, as nulls, which a template would write out: they are
dropped from messages, tool calls and tools, at any depth. So is, therefore, a null that was meant ("unit": null in an
object of arguments); arguments in a JSON string keep theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import UserError, shown
from ..files import parse_json

Messages = list[dict[str, Any]]


def without_nulls(value: Any) -> Any:
    """`value` without the keys of its objects, at any depth, that are null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value


def normal_messages(messages: Any, where: str) -> Messages:
    """The messages without nulls and empty lists, with the arguments of their tool calls as objects.

    Raises UserError where arguments are no object, nor one in a JSON string.
    """
    normal = []
    for index, message in enumerate(messages):
        kept = {key: value for key, value in message.items() if value is not None and value not in ([], {})}
        if "tool_calls" in kept:
            kept["tool_calls"] = _calls(kept["tool_calls"], f"{where}, message {index}: 'tool_calls'")
        normal.append({key: value if key == "tool_calls" else without_nulls(value) for key, value in kept.items()})
    return normal


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{place} must be a list of calls, each an object, got {shown(calls)}")
    return [_changed(without_nulls(call), lambda arguments: _arguments(arguments, place)) for call in calls]


def _changed(call: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The call, which may stand in a `function` of its own, with other arguments, where it has any."""
    inner = call["function"] if isinstance(call.get("function"), dict) else call
    if "arguments" in inner:
        inner = {**inner, "arguments": change(inner["arguments"])}
    return {**call, "function": inner} if isinstance(call.get("function"), dict) else inner


def _arguments(arguments: Any, place: str) -> dict[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except ValueError as error:
            reason = getattr(error, "msg", error)
            raise UserError(f"{place} has arguments whose text is not valid JSON: {reason}") from None
    if not isinstance(arguments, dict):
        raise UserError(f"{place} has arguments that are no object, got {shown(arguments)}")
    return arguments


def with_arguments_as_text(messages: Messages) -> Messages:
    """The normal messages with the arguments of their tool calls as JSON text, for templates that add it to text."""

    def as_text(arguments: Any) -> Any:
        return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments

    return [
        {**message, "tool_calls": [_changed(call, as_text) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def content_text(content: Any) -> str:
    """The text of a message's content, which is a string, a list of text parts, or nothing."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def check_content(content: Any, place: str) -> None:
    """Raise UserError unless this is text, or a list of {"type": "text", "text": ...}."""
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise UserError(f"{place} must have text as its 'content', got {shown(content)}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind != "text":
            raise UserError(f"{place} has a part of type {kind!r}, but models are trained on text alone: remove it")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{place} must have text, or parts that are {{'type': 'text', 'text': ...}}, got {shown(part)}"
            )
