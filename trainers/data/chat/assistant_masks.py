"""Which part of a rendered conversation is the assistant's.

Where the chat template marks it with {% generation %} ... {% endgeneration %}, what it marks. Otherwise it is found
turn by turn, and only taken where everything agrees with the text of the whole:

    start   where what the template renders of the messages before, with its generation prompt, ends, or parts from it
    end     behind the last closing token before the next message's content, with the white space that follows it in
            the template; of the last turn, the end of the text
    checked the contents' places, from one more rendering in which each of them carries a mark; without the marks it
            must be the whole again, and each turn's content must end within its own span

Differs from TRL 1.16, which knows some templates by heart and puts others, with marks, in their place: (1) here the
template stays, so the ids are those of inference (TRL's Qwen3 writes thoughts into all turns); (2) nothing of the
generation prompt is scored (TRL's Qwen2.5 scores the line break at its end).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from ...errors import UserError
from .messages import Messages, content_text
from .templates import ChatTemplate

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def marks_turns(tokenizer: Any, options: dict[str, Any]) -> bool:
    return bool(_GENERATION.search(tokenizer.get_chat_template(tools=options.get("tools"))))


def assistant_spans(
    template: ChatTemplate, messages: Any, options: dict[str, Any], place: str
) -> tuple[str, list[Span]]:
    """The rendered conversation, and the assistant's parts of it in characters.

    Raises UserError, which begins with `place`, where these cannot be told.
    """
    text = template.render(messages, options, place)
    normal = template.normal(messages, place)
    if not marks_turns(template.tokenizer, options):
        by_turns = _turns(template, normal, options, text)
        if by_turns is None:
            raise UserError(
                f"{place}: the chat template does not mark the assistant's turns with {{% generation %}} ... "
                "{% endgeneration %}, and rendering turn by turn does not agree with the whole: use a template that "
                "marks them, or give rows as prompt and completion"
            )
        return text, by_turns
    source = template.tokenizer.get_chat_template(tools=options.get("tools"))
    found: Any = render_jinja_template(  # whose annotation forgets the spans
        conversations=[normal],
        chat_template=source,
        return_assistant_tokens_mask=True,
        **{**template.tokenizer.special_tokens_map, **options},
    )
    (rendered,), (spans,) = found
    if rendered != text:  # the template depends on the time of day, or on nothing that we know
        raise UserError(f"{place} is rendered otherwise a second time, so that its assistant's turns cannot be found")
    return text, spans


def token_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, by its characters, whether it overlaps one of the ordered spans.

    Tokenizers that trim offsets give a token of white space none: it has those behind the token before.
    """
    mask, at, behind = [], 0, 0
    for start, end in offsets:
        if start == end:
            start = min(behind, end)
        behind = end
        while at < len(spans) and start >= spans[at][1]:
            at += 1
        mask.append(at < len(spans) and end > spans[at][0])
    return mask


def _turns(template: ChatTemplate, messages: Messages, options: Any, text: str) -> list[Span] | None:
    """The span of each assistant's turn; None where any of it does not agree with the whole."""
    ids, space = template.closing
    marks = _mark_places(template, messages, options, text)
    if not ids or marks is None:
        return None
    closing = template.tokenizer.convert_ids_to_tokens(ids[0])
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    starts = {index: _start(template, messages, index, options, text, marks) for index in turns}
    spans: list[Span] = []
    for index in turns:
        start, end = starts[index], len(text)
        if start is None or (spans and start < spans[-1][1]):
            return None
        if index + 1 < len(messages):
            bound = starts[index + 1] if index + 1 in starts else marks.get(index + 1)
            found = -1 if bound is None else text.rfind(closing, start, bound)
            if found < 0:
                return None
            end = found + len(closing)
            end += len(space) if text.startswith(space, end) else 0
        if closing not in text[start:end] or not start <= marks.get(index, start) <= end:
            return None
        spans.append((start, end))
    return spans


def _start(
    template: ChatTemplate, messages: Messages, index: int, options: Any, text: str, marks: dict[int, int]
) -> int | None:
    """Where the turn begins, behind its generation prompt."""
    if index == 0:  # nothing to render before it
        prompt, content = template.generation_prompt(), content_text(messages[0].get("content")).strip()
        end = marks.get(0)
        header = -1 if end is None else text.rfind(content, 0, end)
        found = text.rfind(prompt, 0, header) if prompt and header >= 0 else -1
        start = found + len(prompt)
        return start if found >= 0 and not text[start:header].strip() else None
    before = template.attempt(messages[:index], options, add_generation_prompt=True)
    bare = template.attempt(messages[:index], options)
    if before is None or bare is None:
        return None
    if text.startswith(before):
        content = content_text(messages[index].get("content")).strip()
        # Without a generation prompt there may be a header in between that is not the assistant's to write.
        direct = content and text[len(before) :].lstrip().startswith(content)
        return len(before) if before != bare or direct else None
    shared = len(commonprefix([before, text]))
    return shared if text.startswith(bare) and shared > len(bare) else None


def _mark_places(template: ChatTemplate, messages: Messages, options: Any, text: str) -> dict[int, int] | None:
    """Where in the text each assistant's content ends and each other's begins; None where marks change more than
    their own places. An assistant's turn without text, which only calls a tool, has none."""
    word = "zQj"
    while word in text:
        word += "Qj"
    marked, expected = [], []
    for index, message in enumerate(messages):
        content, mark = message.get("content") or "", f"{word}{index}{word}"
        own = message["role"] == "assistant"
        if not own or content_text(content).strip():
            message = {**message, "content": _with_mark(content, mark, at_end=own)}
            expected.append(index)
        marked.append(message)
    pieces = re.split(rf"{word}(\d+){word}", template.attempt(marked, options) or "")
    if "".join(pieces[::2]) != text or [int(number) for number in pieces[1::2]] != expected:
        return None
    places, at = {}, 0
    for piece, index in zip(pieces[::2], expected, strict=False):
        at += len(piece)
        places[index] = at
    return places


def _with_mark(content: Any, mark: str, *, at_end: bool) -> Any:
    """The mark inside of white space at the content's edges, which some templates trim."""
    if isinstance(content, list):
        at = len(content) - 1 if at_end else 0
        part = {**content[at], "text": _with_mark(content[at]["text"], mark, at_end=at_end)}
        return [*content[:at], part, *content[at + 1 :]]
    edge = len(content.rstrip()) if at_end else len(content) - len(content.lstrip())
    return content[:edge] + mark + content[edge:]
