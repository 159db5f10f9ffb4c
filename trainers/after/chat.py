"""`logratio chat MODEL_OR_RUN`: a conversation with a model, token by token."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any, Literal

import torch
import tyro

from logratio.losses.options import Count, NotNegative

from ..data.chat.templates import ChatTemplate
from ..errors import UserError
from ..policy.checks import learned_positions
from .trained import Dtype, device_of, load_trained


@dataclass(frozen=True, kw_only=True)
class Options:
    """Who answers, and how."""

    model: tyro.conf.Positional[str]
    """Hub name, folder of a model, or output_dir of a run."""
    prompt: str | None = None
    """Answer this, and end; without it lines are read until the input ends."""
    system: str | None = None
    """The system's message, for models with a chat template."""
    temperature: NotNegative = 0.7
    """Of sampling; 0 takes the likeliest token."""
    max_new_tokens: Count = 256
    """Longest answer, in tokens."""
    dtype: Dtype = "float32"
    """Of the model's weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cuda where there is one."""
    seed: int = 42
    """Of sampling."""


def main(argv: list[str] | None = None) -> int:
    """Talk to a model or a run: messages through its chat template, else text that it goes on with."""
    options = tyro.cli(Options, args=argv, prog="logratio chat", use_underscores=True)
    model, tokenizer = load_trained(options.model, options.dtype, device_of(options.device))
    if options.system and not tokenizer.chat_template:
        raise UserError(
            f"--system: {options.model} has no chat template, which it would be a part of: begin the text with it"
        )
    torch.manual_seed(options.seed)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    if options.prompt is not None:
        answer(options, model, tokenizer, messages, options.prompt)
        return 0
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as the command line's words come
    while (line := asked()) is not None:
        if line.strip():
            answer(options, model, tokenizer, messages, line)
    return 0


def asked() -> str | None:
    """The next line of the input; None at its end."""
    shown = sys.stdin is not None and sys.stdin.isatty()
    try:
        return input("> " if shown else "")
    except EOFError:
        return None


def answer(options: Options, model: Any, tokenizer: Any, messages: list[dict[str, str]], text: str) -> str:
    """Print what the model says to the text, as it comes, and enter both into the conversation.

    A model without a chat template goes on with the text alone. Raises UserError where the template does not render the
    conversation, or the model has no position left for an answer.
    """
    from transformers import TextStreamer

    text = text.encode(errors="surrogateescape").decode(errors="replace")  # bytes that are no text, too
    messages.append({"role": "user", "content": text})
    templated = bool(tokenizer.chat_template)
    if templated:
        text = ChatTemplate(tokenizer).render(messages, {}, "the conversation", add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not templated).to(model.device)
    length, positions = inputs["input_ids"].shape[1], learned_positions(model)
    if not length:
        raise UserError(f"there is nothing to go on from: {options.model} has no chat template, so give it some text")
    room = options.max_new_tokens if positions is None else min(options.max_new_tokens, positions - length)
    if room < 1:
        raise UserError(
            f"the conversation has {length:,} tokens, and {options.model} has learned {positions:,} positions, the "
            "answer's among them: begin a shorter one"
        )
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=room,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    said: str = tokenizer.decode(out[0, length:], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": said})
    return said
