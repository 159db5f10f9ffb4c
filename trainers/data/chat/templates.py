"""A tokenizer's chat template at work: what it raises becomes a sentence, what it does is found by probing."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

from ...errors import UserError, first_line
from .messages import Messages, content_text, normal_messages, with_arguments_as_text

_ANSWER = "answer"
_PROBES: tuple[Messages, ...] = (  # some templates insist on a system turn, others refuse one
    [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}],
    [
        {"role": "system", "content": "rule"},
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": _ANSWER},
    ],
)
_REASONING = frozenset({"reasoning", "reasoning_content", "thinking"})  # names of one thing; transformers copies them
_LINKS = frozenset({"role", "content", "tool_call_id", "id", "weight"})  # these say which, not what


class ChatTemplate:
    """The chat template of `tokenizer`. What it was seen to render of one message is not tried again with its like.

    seen, failed: kinds of messages, and of what is given beside them, that it was seen to render, or not to.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.seen: set[Any] = set()
        self.failed: set[Any] = set()

    def render(self, messages: Any, options: dict[str, Any], place: str, *, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises UserError, which begins with `place`, where the template raises, and where
        something that it was given does not show in the text."""
        messages = self.normal(messages, place)
        text = self.text(messages, options, place, add_generation_prompt=add_generation_prompt)
        self._check_options(messages, options, place)
        self._check_messages(messages, options, place)
        return text

    def normal(self, messages: Any, place: str) -> Messages:
        """The messages as the template is given them."""
        messages = normal_messages(messages, place)
        if any("tool_calls" in message for message in messages) and self._takes_text_alone:
            messages = with_arguments_as_text(messages)
        if any(isinstance(message.get("content"), list) for message in messages) and not self._takes_parts:
            messages = [
                {**m, "content": content_text(m["content"])} if isinstance(m.get("content"), list) else m
                for m in messages
            ]
        return messages

    def text(
        self, messages: Messages, options: dict[str, Any], place: str, *, add_generation_prompt: bool = False
    ) -> str:
        """Normal messages as text, whatever of them shows in it."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
                )
            )
        except Exception as error:  # a template raises what it likes: jinja's errors, TypeError, RecursionError, ...
            raise UserError(
                f"{place}: the chat template does not render this conversation: {first_line(error)}"
            ) from error

    def attempt(
        self, messages: Messages, options: dict[str, Any], *, add_generation_prompt: bool = False
    ) -> str | None:
        """The same, or None where the template raises."""
        try:
            return self.text(messages, options, "", add_generation_prompt=add_generation_prompt)
        except UserError:
            return None

    @cached_property
    def closing(self) -> tuple[list[int], str]:
        """The token that closes an assistant's turn, as `closing_ids` has it, and the white space written behind it."""
        return self._closing_of(self.example)

    @cached_property
    def example(self) -> str:
        """A short conversation as the template writes it; empty where it writes none."""
        return next((text for probe in _PROBES if (text := self.attempt(probe, {}))), "")

    def generation_prompt(self) -> str:
        """What the template writes in front of an assistant's answer; empty where it writes nothing."""
        for probe in _PROBES:
            with_prompt, without = (
                self.attempt(probe[:-1], {}, add_generation_prompt=True),
                self.attempt(probe[:-1], {}),
            )
            if without and with_prompt and with_prompt.startswith(without):
                return with_prompt[len(without) :]
        return ""

    def _closing_of(self, text: str) -> tuple[list[int], str]:
        _, found, tail = text.rpartition(_ANSWER)
        added = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        for token in self.tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []:
            if token in added:
                behind = tail.partition(self.tokenizer.convert_ids_to_tokens(token))[2]
                return [token], behind[: len(behind) - len(behind.lstrip())]
            if self.tokenizer.decode([token]).strip():
                break
        return [], ""

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether a content of text parts is written as these texts, and not as the list that holds them."""
        parts = [{"type": "text", "text": "left"}, {"type": "text", "text": "right"}]
        text = self.attempt([{"role": "user", "content": parts}], {}) or ""
        return "left" in text and "right" in text and not re.search(r"['\"]text['\"]", text)

    @cached_property
    def _takes_text_alone(self) -> bool:
        """Whether a tool call's arguments have to be text, since the template raises at an object."""
        call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
        assistant: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
        probe: Messages = [{"role": "user", "content": "question"}, assistant]
        return self.attempt(probe, {}) is None and '{"a": 1}' in (self.attempt(with_arguments_as_text(probe), {}) or "")

    def _check_options(self, messages: Messages, options: dict[str, Any], place: str) -> None:
        tools = options.get("tools")
        kind = (frozenset(options), len(tools or ()) > 1, messages[0]["role"])
        if kind in self.seen:
            return
        if tools and not self._differs(messages, messages, options, {**options, "tools": tools[:-1] or None}):
            self.failed.add(kind)
            raise UserError(
                f"{place} has 'tools' that are not in the text that the chat template renders: use a template that "
                "knows tools, or remove them"
            )
        source = self.tokenizer.get_chat_template(tools=tools)
        for key in options.keys() - {"tools"}:
            # A switch may well leave the text of this row as it is, so that it is named there has to do.
            if not re.search(rf"(?<!\w){re.escape(key)}(?!\w)", source):
                self.failed.add(kind)
                raise UserError(
                    f"{place}: 'chat_template_kwargs' has {key!r}, of which the chat template knows nothing: remove it"
                )
        self.seen.add(kind)

    def _check_messages(self, messages: Messages, options: dict[str, Any], place: str) -> None:
        before = None
        for index, message in enumerate(messages):
            blank = not content_text(message.get("content")).strip()
            kind = (before, message["role"], frozenset(message), blank, len(message.get("tool_calls", ())) > 1)
            before = message["role"]
            if kind in self.seen:
                continue
            for key, changed in _changes(message):
                # Templates drop the reasoning of earlier turns, so what counts is what they write of the last one.
                cuts = (messages[: index + 1], messages)
                others = ([*cut[:index], changed, *cut[index + 1 :]] for cut in cuts)
                pairs = zip(cuts, others, strict=True)
                if not any(self._differs(cut, other, options, options) for cut, other in pairs):
                    self.failed.add(kind)
                    raise UserError(
                        f"{place}, message {index}: its {key!r} is not in the text that the chat template renders of "
                        f"this role ({message['role']!r}): use a template that knows it, or remove it"
                    )
            self.seen.add(kind)

    def _differs(self, left: Messages, right: Messages, given: dict[str, Any], other: dict[str, Any]) -> bool:
        """Whether the second is rendered otherwise than the first, or not at all; False where the first is not."""
        text = self.attempt(left, given)
        return text is not None and self.attempt(right, other) != text


def _changes(message: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """For each key of the message that has something to say, the message with less or other of it."""
    changes = []
    content: Any = message.get("content")
    if content_text(content).strip():
        more = [*content, {"type": "text", "text": "x"}] if isinstance(content, list) else str(content).rstrip() + "x"
        changes.append(("content", {**message, "content": more}))
    for key in message.keys() - _LINKS:
        if message[key] == "" or (key == "name" and message["role"] in ("tool", "function")):
            continue
        gone = _REASONING if key in _REASONING else {key}
        changed: dict[str, Any] = {"content": "", **{k: v for k, v in message.items() if k not in gone}}
        if key == "tool_calls" and len(message[key]) > 1:
            changed[key] = message[key][:-1]
        changes.append((key, changed))
    return changes


def closing_ids(tokenizer: Any) -> list[int]:
    """The token with which the chat template closes an assistant's last turn, as a list of one id.

    Empty where there is no template, or where what follows the answer is ordinary text, at which nobody could stop.
    White space in front of the token is passed over ("answer </s>"), and what comes after it ("\\n") is no part of it.
    """
    return ChatTemplate(tokenizer).closing[0] if getattr(tokenizer, "chat_template", None) else []
