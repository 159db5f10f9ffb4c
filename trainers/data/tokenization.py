"""Text and conversations to token ids, and where a prompt ends in them.

The rules are those of TRL 1.16, so that the same rows give the same ids: a prompt alone and the prompt
with its completion are tokenized each in one piece, and the completion starts where the two part. A
conversational prompt is rendered with the generation prompt of its chat template, also where it ends with an
assistant's turn, which the completion follows as a turn of its own; EOS is appended, as text, to plain text only
and only where it is missing.

Differs from TRL:
(1) Ids decide about BOS and EOS, not text: of two BOS at the start (the tokenizer's and the text's) one is left, and of
    two EOS at the end (the tokenizer's, the text's, the appended one); what a tokenizer adds behind a plain prompt is
    taken away, and a prompt to generate from that ends in EOS loses it (plain text) or is refused (conversations).
(2) The arguments of tool calls that are JSON in a string are decoded, unless the template takes text only; nulls
    within messages, tool calls and tools are dropped (`messages.py`).
(3) What the template is given and does not show in its text is an error (`templates.py`): tools, tool calls,
    reasoning, a role's content, a key of a message. Tried once for each role, the role before it and the keys together.
(4) assistant_only_loss without marks in the template, and with tokenizers that trim offsets (`assistant_masks.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..errors import UserError, first_line, shown
from .chat.assistant_masks import assistant_spans, marks_turns, token_mask
from .chat.messages import Messages, check_content, content_text
from .chat.templates import ChatTemplate

Text = str | Messages
"""Plain text, or a conversation as a list of {"role": ..., "content": ...}."""


def is_conversation(value: Any) -> bool:
    return isinstance(value, list) and (not value or isinstance(value[0], dict))


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many leading elements the two share."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    return next(i for i in range(length) if left[i] != right[i])


def implicit_prompt(chosen: Text, rejected: Text) -> int:
    """Length of the prompt that `chosen` and `rejected` both begin with, in characters or messages.

    At least the last element is left to both, and a space in front of the first difference goes to the completions.
    """
    shared = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    differs = shared < min(len(chosen), len(rejected)) and chosen[shared] != rejected[shared]
    return shared - 1 if differs and shared > 0 and chosen[shared - 1] == " " else shared


def with_eos(text: str, tokenizer: Any) -> str:
    return text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token


def check_tokenizer(tokenizer: Any, *, conversational: bool, assistant_only_loss: bool = False) -> None:
    """Raise UserError where the tokenizer lacks what the data need of it."""
    if not conversational:
        if assistant_only_loss:
            raise UserError("assistant_only_loss needs conversations (messages), but the data are plain text")
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no eos_token to end a completion with: set one in its configuration")
        return
    if not tokenizer.chat_template:
        raise UserError(
            "the data are conversations, but the tokenizer has no chat template: "
            "name one (--chat_template_path), or turn the data into plain text"
        )
    if assistant_only_loss and not (marks_turns(tokenizer, {}) or ChatTemplate(tokenizer).closing[0]):
        raise UserError(
            "assistant_only_loss needs a chat template that marks the assistant's turns with "
            "{% generation %} ... {% endgeneration %}, or at least closes them with a token of their own, and this "
            "tokenizer's does neither: use another template, or give rows as prompt and completion"
        )


class Piece(NamedTuple):
    """A text to tokenize. options: what the chat template of a conversation is given beside the messages, as `tools`.
    place: of its row, with which a UserError begins where it cannot be rendered or tokenized."""

    text: Text
    options: dict[str, Any]
    place: str


def _are_plain(pieces: Sequence[Piece]) -> bool:
    """Whether they are plain text, as all of a data set are or none."""
    return not pieces or isinstance(pieces[0].text, str)


class Encoder:
    """The tokenizer with its chat template, for the rows of one data set."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self._tail = _added_behind(tokenizer)
        special = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def wholes(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """Ids of texts to learn from. Plain ones have ended in EOS since `with_eos`, which is then the last id."""
        eos, plain = [self.tokenizer.eos_token_id], _are_plain(pieces)
        return [[*ids, *eos] if plain and ids[-1:] != eos else ids for ids in self._ids(pieces)]

    def prompts(self, pieces: Sequence[Piece], *, to_generate: bool = False) -> list[list[int]]:
        """Ids of prompts alone, conversations with the generation prompt; to_generate: never with EOS at the end."""
        eos, plain = self.tokenizer.eos_token_id, _are_plain(pieces)
        result = []
        for ids, piece in zip(self._ids(pieces, add_generation_prompt=True), pieces, strict=True):
            if to_generate and not plain and ids[-1:] == [eos]:
                raise UserError(
                    f"{piece.place}: the prompt as rendered ends with EOS, behind which nothing can be generated: use "
                    "a chat template that writes a generation prompt"
                )
            # A lone EOS that is BOS, too, is a beginning.
            while to_generate and ids[-1:] == [eos] and not (len(ids) == 1 and eos == self.tokenizer.bos_token_id):
                ids = ids[:-1]
            result.append(ids)
        return result

    def assistant_mask(self, messages: Messages, options: dict[str, Any], place: str) -> list[bool]:
        """For each id of the conversation whether the assistant's turns have it."""
        text, spans = assistant_spans(self.template, messages, options, place)
        try:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        except NotImplementedError:
            raise UserError(
                f"{place}: this tokenizer does not say which characters a token is of, so that the assistant's turns "
                "cannot be told apart in its ids: use a fast tokenizer"
            ) from None
        mask = token_mask(encoded["offset_mapping"], spans)
        return mask[self._bounds(encoded["input_ids"], plain=False)]

    def count_special(self, texts: Iterable[Text]) -> int:
        """How many special tokens the row's own text has. One EOS that ends a plain text is an end, and not counted."""
        count = 0
        for text in texts:
            if isinstance(text, str):
                count += len(self._special.findall(text.removesuffix(self.tokenizer.eos_token or "\0")))
            else:
                count += sum(len(self._special.findall(content_text(message.get("content")))) for message in text)
        return count

    def _ids(self, pieces: Sequence[Piece], *, add_generation_prompt: bool = False) -> list[list[int]]:
        """All at once, which uses all cores. A text that the tokenizer does not take is one of them, not always the
        first, whose place the error has."""
        if not pieces:
            return []
        plain = _are_plain(pieces)
        strings = [
            text
            if isinstance(text, str)
            else self.template.render(text, options, place, add_generation_prompt=add_generation_prompt)
            for text, options, place in pieces
        ]
        try:
            # verbose=False: lengths beyond the model's are our caller's to cut, and need no warning.
            encoded = self.tokenizer(strings, add_special_tokens=plain, verbose=False, return_attention_mask=False)
        except UserError:  # knows its place
            raise
        except Exception as error:
            raise UserError(f"{pieces[0].place}: the tokenizer does not take the text: {first_line(error)}") from error
        return [ids[self._bounds(ids, plain)] for ids in encoded["input_ids"]]

    def _bounds(self, ids: list[int], plain: bool) -> slice:
        """What stays: nothing that the tokenizer adds at the end, one BOS at the start at most, one EOS at the end."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start, stop = 0, len(ids)
        if plain and self._tail and ids[-len(self._tail) :] == self._tail:
            stop -= len(self._tail)
        while bos is not None and stop - start > 1 and ids[start] == ids[start + 1] == bos:
            start += 1
        while eos is not None and stop - start > 1 and ids[stop - 1] == ids[stop - 2] == eos:
            stop -= 1
        return slice(start, stop)


def _added_behind(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer adds by itself behind a plain text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for at in range(len(whole) - len(bare) + 1):
        if bare and whole[at : at + len(bare)] == bare:
            return list(whole[at + len(bare) :])
    return []


_ROLES = ("system", "developer", "user", "assistant", "tool")
_MEANT = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}


def check_messages(messages: Any, where: str) -> None:
    """Raise UserError unless these are messages. In which order roles may come is for the chat template to say.

    where: the place, which begins the error's sentence.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} must be a list of at least one message, got {shown(messages)}")
    for index, message in enumerate(messages):
        place = f"{where}, message {index}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{place} must be an object with 'role' and 'content', got {shown(message)}")
        role, content = message["role"], message.get("content")
        name = role.strip().lower()
        meant = _MEANT.get(name, name if name in _ROLES else role)
        if role != meant:  # a template would write it as it stands, and nothing would be the assistant's
            raise UserError(f"{place} has the role {role!r}: write {meant!r}, as chat templates know it")
        calls = message.get("tool_calls") or message.get("function_call")
        if content is not None or not (role == "assistant" and calls):
            check_content(content, place)
        if role == "assistant" and not calls and not content_text(content).strip():
            raise UserError(f"{place} is an assistant's turn without text: give it an answer or remove the row")
