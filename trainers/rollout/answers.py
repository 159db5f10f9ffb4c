"""What a text says its answer is: a plain number, or the words of it.

A formula is never a number: "3e", "2 x", "1/2", "x + 46" and "46, 47" are compared as they are written. Whether two
formulas are equal is a question for `accuracy.py`.
"""

from __future__ import annotations

import re
from decimal import Decimal

from ..data.tokenization import Text

_MARKER = re.compile(r"####|\b[Aa]nswer(?: is|:)|(?m:^)A:|\\boxed\{")
# A minus is a sign only where nothing stands before it that it could be subtracted from.
_NUMBER = re.compile(r"(?<![\w.])(?:(?<!\))-)?\d+(?:,\d{3})*(?:\.\d+)?|(?<![\w.])-?\.\d+")

_LETTER = r"[A-Za-z\u0370-\u03ff]"  # Latin and Greek, of which variables are made
_VARIABLE = rf"(?<!{_LETTER}){_LETTER}(?!{_LETTER})"
_SPACE = r"(?:[ \t~]|\\[,;:! ])*"
_OPERATOR = r"[\^_/×·÷±√]"
_COMMAND = r"\\(?!(?:approx|q?quad|Rightarrow|implies|therefore|displaystyle)\b)[A-Za-z]+"
_BEFORE = re.compile(  # what makes a number that follows it a part of a formula
    rf"(?:{_OPERATOR}{_SPACE}|{_COMMAND}{_SPACE}|[\w)}}\]][({{\[]|(?<!\\){{|\d,{_SPACE}"
    rf"|(?:[\d)}}\]]|{_VARIABLE}){_SPACE}[-+]{_SPACE}"
    rf"|[\w)}}\]]\*{{1,2}}|[\w)}}\]][ \t]+\*{{1,2}}[ \t]+|[\w)}}\]][ \t]*[<>≤≥][ \t]+)$"
)
_AFTER = re.compile(  # and one that it follows
    rf"[0-9_({{\[⁰¹²³⁴-⁹]|{_LETTER}|[.,:]\d|,{_SPACE}[-+]?[\d\\]|!"
    rf"|{_SPACE}(?:{_OPERATOR}|\\(?![()\[\]%$\\])|[-+]{_SPACE}(?:[\d(\\]|{_VARIABLE})|(?:{_VARIABLE}|(?:pi|sqrt)\b))"
    rf"|\*{{1,2}}[\w(\\]|[ \t]+\*{{1,2}}[ \t]|[ \t]+[<>≤≥]"
)
_FORMULA = re.compile(r"[\\^_=+*/{}<>|\d]")
_DELIMITERS = re.compile(r"^(?:[\s$.]|\\[(\[])+|(?:[\s$.]|\\[)\]])+$")


def text_of(completion: Text) -> str:
    """A completion's text: its own, or that of its last message."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")


def final_answer(text: str) -> str | Decimal:
    """What a text says its answer is.

    That is the first number after the last marker (`####`, `answer is`, `answer:`, `A:` at the start of a line, or
    inside `\\boxed{}`); in a text without a marker its last number. Where there is no number, or that one is a part of
    a formula, it is the text after the marker up to the line's end, or the last line: words in lower case, a formula
    without its spaces. Numbers are compared as such: "1,000.0" equals "1000".
    """
    markers = list(_MARKER.finditer(text))
    said = text[markers[-1].end() :] if markers else text
    if markers and markers[-1].group().endswith("{"):
        said = _until_closed(said)
    numbers = list(_NUMBER.finditer(said))
    if numbers:
        number = numbers[0 if markers else -1]
        minus = number.group().startswith("-")
        before, after = said[: number.start() + minus], said[number.end() :]
        if not (_BEFORE.search(before) or _AFTER.match(after)):
            return Decimal(number.group().replace(",", ""))
    lines = said.strip().splitlines() or [""]
    words = _DELIMITERS.sub("", lines[0 if markers else -1])
    return re.sub(r"\s", "", words) if _FORMULA.search(words) else words.lower()


def _until_closed(text: str) -> str:
    """Up to the brace that closes one opened before the text; all of it where none does."""
    depth = 1
    for brace in re.finditer(r"(?<!\\)[{}]", text):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[: brace.start()]
    return text
