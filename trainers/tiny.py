"""The embedded model `tiny`: a byte-level tokenizer and a Llama of 0.67 M parameters, both built in memory."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes: any text, one token a byte."""
    raise NotImplementedError


def tiny_config(**overrides: Any) -> LlamaConfig:
    """The configuration of `tiny_model`, with any field of `LlamaConfig` replaced."""
    raise NotImplementedError


def tiny_model(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A tiny Llama with random float32 weights that depend on `seed` alone."""
    raise NotImplementedError
