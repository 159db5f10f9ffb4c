"""The chat template that a run is told to use (`--chat_template_path`), and what it is told to give it in every
conversation (`--chat_template_kwargs`).

Both are written into the tokenizer: the run's data, rollouts and evaluations are rendered by it, and so is whatever the
saved model is asked later. Differs from TRL 1.16: (1) a tokenizer's template is taken without its tokens, so the
model's embeddings keep their rows, and a template whose tokens the model has not is refused; (2) EOS stays the
tokenizer's own: what closes a turn is found by rendering, and entered into the generation_config (`rollout/ends.py`);
(3) the values are the saved template's defaults, where TRL's are the training's alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.meta import find_undeclared_variables
from transformers.utils.chat_template_utils import _compile_jinja_template

from ..data.chat.conversations import callers_options, check_value
from ..data.chat.templates import ChatTemplate
from ..errors import UserError, first_line
from .load import load_tokenizer

FILES = (".jinja", ".jinja2", ".j2")


def with_template(tokenizer: Any, path: str | None, values: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """A tokenizer whose chat template is that of `path` and whose variables are these `values`, where a row does not
    say otherwise; and what to tell about it. The tokenizer itself where neither is given.

    path: a file of jinja's, or the folder or hub name of a tokenizer. Raises UserError where it has no template that
    the model's tokens can write, or where no template has such variables.
    """
    if path is None and not values:
        return tokenizer, []
    tokenizer, added = copy.deepcopy(tokenizer), []  # which may be the caller's
    if path is not None:
        tokenizer.chat_template, added = (read(path), []) if is_file(path) else of_tokenizer(path)
    if values:
        tokenizer.chat_template = with_values(tokenizer, values)
    return tokenizer, [] if path is None else check_written(tokenizer, added, f"--chat_template_path {path}")


def is_file(path: str) -> bool:
    return path.endswith(FILES) or Path(path).is_file()


def read(path: str) -> str:
    """The template in a file; UserError unless jinja reads it."""
    said = f"--chat_template_path {path}"
    try:
        source = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{said} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{said} cannot be read: it is no UTF-8") from error
    try:
        _compile_jinja_template(source)
    except Exception as error:  # of jinja's, at a line of the file
        line = f", line {found}" if (found := getattr(error, "lineno", None)) else ""
        raise UserError(f"{said}{line}: {first_line(error)}") from error
    return source


def of_tokenizer(name: str) -> tuple[Any, list[str]]:
    """Another tokenizer's template, or several by their names, and the tokens that were added to it."""
    try:
        tokenizer = load_tokenizer(name)
    except UserError as error:
        raise UserError(f"--chat_template_path is no {FILES[0]} file: {error}") from error
    if not tokenizer.chat_template:
        raise UserError(f"--chat_template_path {name}: that tokenizer has no chat template")
    return tokenizer.chat_template, [str(token) for token in tokenizer.added_tokens_decoder.values()]


def check_written(tokenizer: Any, added: Sequence[str], said: str) -> list[str]:
    """Raise UserError where a conversation is written with tokens, of those added to another tokenizer, that this one
    has not; returns what to tell of how an answer ends. said: the option, for messages."""
    template, vocabulary = ChatTemplate(tokenizer), tokenizer.get_vocab()
    written = template.example
    if not written:
        raise UserError(f"{said}: the template renders no conversation of a question and an answer")
    if missing := [token for token in added if token in written and token not in vocabulary]:
        raise UserError(
            f"{said} writes {', '.join(missing)}, which the model's tokenizer does not have: use a template of tokens "
            "that it has, or add these to it and to the model's embeddings beforehand"
        )
    if template.closing[0]:
        return []
    return [f"{said} closes an answer with no token of its own: nothing teaches the model where to end"]


def with_values(tokenizer: Any, values: Mapping[str, Any]) -> Any:
    """The tokenizer's template, or each of several by their names, in which what is not given has these values.

    UserError for what none of them reads.
    """
    said, template = "--chat_template_kwargs", tokenizer.chat_template
    if not template:
        raise UserError(f"{said}: the tokenizer has no chat template to give them to; name one (--chat_template_path)")
    each = template if isinstance(template, dict) else {"": template}
    known = set().union(*map(variables, each.values())) - set(tokenizer.special_tokens_map)
    if unknown := sorted(values.keys() - known):
        reads = f"it reads {', '.join(sorted(known))}" if known else "it reads nothing of the kind"
        raise UserError(f"{said} has {', '.join(unknown)}, which the chat template does not read; {reads}")
    check_value(values, said)
    # Python's literals are jinja's; the empty text at the end keeps the template's own beginning, white space and all.
    head = "".join(f"{{% if {k} is not defined %}}{{% set {k} = {v!r} %}}{{% endif %}}" for k, v in values.items())
    written = {name: f"{head}{{{{ '' }}}}{source}" for name, source in each.items()}
    return written if isinstance(template, dict) else written[""]


def variables(source: str) -> set[str]:
    """What a template reads that is neither its own nor given to it in any case."""
    jinja = _compile_jinja_template(source).environment
    return find_undeclared_variables(jinja.parse(source)) - {*callers_options(), "documents"}
