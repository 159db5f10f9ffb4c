"""The embedded model `tiny`: a byte-level tokenizer and a Llama of 0.67 M parameters, both built in memory.

They need no network and no file, take any text, and learn the embedded arithmetic task in tens of
seconds on a CPU, so every command of the project can be tried, and tested, with them.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TINY = "tiny"  # what options call it
MAX_LENGTH = 2048
PAD, START, EOS = "<|pad|>", "<|im_start|>", "<|im_end|>"

# A turn's end is the EOS token, so a conversation ends where generation stops. The line break between turns stands in
# front of a turn, not after it: what ends a conversation is then EOS, and nothing is scored after it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- ('' if loop.first else '\n') + '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\n<|im_start|>assistant\n' -}}{%- endif -%}
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, whose id is the byte, then `<|pad|>`, `<|im_start|>` and `<|im_end|>`, which is EOS; no BOS.

    Decoding gives back any text exactly. The chat template marks the assistant's turns with `{% generation %}`.
    """
    # The byte-level alphabet writes a printable byte as its own character and the others, in order, from chr(256) on.
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    vocab = {chr(byte) if chr(byte) in alphabet else chr(256 + others.index(byte)): byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, START, EOS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[START],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(**overrides: Any) -> LlamaConfig:
    """The configuration of `tiny_model`, with any field of `LlamaConfig` replaced."""
    tokenizer = tiny_tokenizer()
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.06,  # near 1 / sqrt(hidden_size): learns the embedded task in less than half the steps
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**{**fields, **overrides})


def tiny_model(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A tiny Llama with random float32 weights that depend on `seed` alone; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**overrides)).float()
