"""What is found out about a chat template by rendering with it, on templates built like those of known families."""

import pytest

from logratio.trainers.data.chat.templates import closing_ids
from logratio.trainers.policy.tiny import tiny_tokenizer

CHATML = """\
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
LLAMA3 = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""
GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Roles must alternate') }}{%- endif -%}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim -}}
{{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
SYSTEM_FIRST = (
    "{%- if messages[0].role != 'system' -%}{{ raise_exception('system first') }}{%- endif -%}"
    "{%- for m in messages -%}{{ m.role + ': ' + m.content + ' <|eot_id|>' }}{%- endfor -%}"
)
WORDS = "{%- for m in messages -%}{{ m.role + ': ' + m.content + '\\n' }}{%- endfor -%}"
NEXT_TURN_CLOSES = "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{%- endfor -%}"


def tokenizer_with(template, *tokens, **options):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *tokens]})
    tokenizer.add_special_tokens(options)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template, closing",
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (GEMMA, "<end_of_turn>"),
        (SYSTEM_FIRST, "<|eot_id|>"),
        (WORDS, None),
        (NEXT_TURN_CLOSES, None),
        ("{{ raise_exception('no') }}", None),
        ("{{ 'always the same' }}", None),
        (None, None),
    ],
)
def test_the_closing_token_is_found_by_rendering(template, closing):
    tokens = ["<|eot_id|>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>"]
    tokenizer = tokenizer_with(template, *tokens, bos_token="<s>", eos_token="<|endoftext|>")
    expected = [] if closing is None else [tokenizer.convert_tokens_to_ids(closing)]
    assert closing_ids(tokenizer) == expected
    assert tokenizer.eos_token_id not in expected


def test_a_closing_that_is_no_token_of_its_own_is_none():
    # <end_of_turn> is spelled out in bytes here: stopping at "<" would cut answers
    assert closing_ids(tokenizer_with(GEMMA, bos_token="<s>")) == []


def test_the_embedded_tokenizer_closes_with_eos():
    tokenizer = tiny_tokenizer()
    assert closing_ids(tokenizer) == [tokenizer.eos_token_id]
