"""What a row gives its chat template arrives in the text, or the row is named."""

import json

import pytest

from logratio.losses import Kind
from logratio.trainers.data.examples import Rows, prepare
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_tokenizer

CHATML = """\
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
STRICT = """\
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('Roles must alternate') }}{%- endif -%}
{{ m.role + m.content }}
{%- endfor -%}"""
WITH_TOOLS = """\
{%- if tools -%}{%- for tool in tools -%}{{ (tool | tojson) + '\\n' }}{%- endfor -%}{%- endif -%}
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.reasoning_content and loop.last -%}{{ '<think>' + m.reasoning_content + '</think>' }}{%- endif -%}
{{ m.content or '' }}
{%- for call in m.tool_calls or [] -%}{{ call.function.name + (call.function.arguments | tojson) }}{%- endfor -%}
{{ '<|im_end|>\\n' }}{%- endfor -%}
{%- if loud -%}{{ '!' }}{%- endif -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
AS_TEXT = WITH_TOOLS.replace("(call.function.arguments | tojson)", "call.function.arguments")
ONE_CALL = WITH_TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
NO_TOOL_ROLE = CHATML.replace("m.content", "(m.content if m.role != 'tool' else '')")
NO_LATER_SYSTEM = CHATML.replace("m.content", "(m.content if loop.first or m.role != 'system' else '')")


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def message(role, content, **more):
    return {"role": role, "content": content, **more}


USER, ANSWER, TOOL = message("user", "how?"), message("assistant", "so"), message("tool", "21", tool_call_id="x1")


def call(arguments, name="warmth"):
    return {"id": "x1", "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, content=""):
    return message("assistant", content, tool_calls=list(calls))


def rendered(template, *messages, **more):
    """The text of one row's example, behind a good row, so that places count."""
    tokenizer = tokenizer_with(template)
    rows = [{"messages": [message("user", "a"), message("assistant", "b")]}, {"messages": list(messages), **more}]
    examples, _ = prepare(Rows("data", rows), Kind.SEQUENCE, tokenizer)
    return tokenizer.decode(examples[1].prompt_ids + examples[1].completions[0].ids)


UNRENDERED = ": the chat template does not render this conversation"
REFUSED = [
    (STRICT, [message("system", "s"), USER, ANSWER], {}, f"{UNRENDERED}: System role not supported"),
    (STRICT, [USER, USER, ANSWER], {}, f"{UNRENDERED}: Roles must alternate"),
    (CHATML, [USER, calling(call({})), TOOL, ANSWER], {}, ", message 1: its 'tool_calls' is not in the text"),
    (ONE_CALL, [USER, calling(call({"a": 1}), call({"b": 2}))], {}, ", message 1: its 'tool_calls' is not in the text"),
    (CHATML, [USER, ANSWER], {"tools": [{"name": "f"}]}, " has 'tools' that are not in the text"),
    (CHATML, [USER, {**ANSWER, "reasoning_content": "hm"}], {}, ", message 1: its 'reasoning_content' is not in"),
    (CHATML, [USER, {**ANSWER, "train": False}], {}, ", message 1: its 'train' is not in the text"),
    (NO_TOOL_ROLE, [USER, ANSWER, TOOL, ANSWER], {}, ", message 2: its 'content' is not in the text"),
    (NO_LATER_SYSTEM, [USER, message("system", "s"), ANSWER], {}, ", message 1: its 'content' is not in the text"),
    (CHATML, [USER, ANSWER], {"chat_template_kwargs": {"loud": True}}, ": 'chat_template_kwargs' has 'loud', of which"),
    (CHATML, [USER, ANSWER], {"chat_template_kwargs": ["loud"]}, ": 'chat_template_kwargs' must be an object"),
    (CHATML, [USER, ANSWER], {"chat_template_kwargs": {"tokenize": False}}, ": 'chat_template_kwargs' has 'tokenize'"),
    (WITH_TOOLS, [USER, ANSWER], {"tools": '{"name": "f"}'}, ": 'tools' must be a list of tools"),
    (WITH_TOOLS, [USER, ANSWER], {"tools": "[f]"}, ": 'tools' is not valid JSON"),
    (
        WITH_TOOLS,
        [USER, calling(call("{town}"))],
        {},
        ", message 1: 'tool_calls' has arguments whose text is not valid",
    ),
    (WITH_TOOLS, [USER, calling(call("[1]"))], {}, ", message 1: 'tool_calls' has arguments that are no object"),
    (WITH_TOOLS, [USER, {**ANSWER, "tool_calls": "f"}], {}, ", message 1: 'tool_calls' must be a list of calls"),
    (CHATML, [USER, ANSWER], {"images": ["a.png"]}, " has 'images', but models are trained on text alone"),
    (CHATML, [message("user", [{"type": "image"}]), ANSWER], {}, ": 'messages', message 0 has a part of type 'image'"),
    (CHATML, [message("user", [{"text": "a"}]), ANSWER], {}, ": 'messages', message 0 must have text, or parts"),
]


@pytest.mark.parametrize("template, messages, more, sentence", REFUSED)
def test_what_cannot_be_rendered_or_does_not_arrive_names_the_row(template, messages, more, sentence):
    with pytest.raises(UserError) as caught:
        rendered(template, *messages, **more)
    text = str(caught.value)
    assert text.startswith(f"data, row 1 (counted from 0){sentence}") and "\n" not in text, text


def test_tool_calls_arrive_as_objects_whatever_the_file_had():
    for arguments in ({"town": "Pecs"}, '{"town": "Pecs"}', {"town": "Pecs", "unit": None}):
        asking = {**calling(call(arguments)), "name": None}
        text = rendered(WITH_TOOLS, USER, asking, TOOL, {**ANSWER, "tool_calls": None})
        assert 'warmth{"town": "Pecs"}<|im_end|>' in text
    # a null that the call itself has, in its JSON, is meant
    assert 'warmth{"town": null}<|im_end|>' in rendered(WITH_TOOLS, USER, calling(call('{"town": null}')))
    assert "warmth{}<|im_end|>" in rendered(WITH_TOOLS, USER, calling(call("")))


@pytest.mark.parametrize("arguments", [{"town": "Pecs"}, '{"town": "Pecs"}'])
def test_a_template_that_adds_arguments_to_text_gets_text(arguments):
    assert 'warmth{"town": "Pecs"}<|im_end|>' in rendered(AS_TEXT, USER, calling(call(arguments)), TOOL, ANSWER)


def test_tools_lose_their_nulls():
    tools = [{"name": "f", "parameters": {"a": {"type": "int", "enum": None}, "b": None}}]
    for given in (tools, json.dumps(tools)):
        text = rendered(WITH_TOOLS, USER, ANSWER, tools=given)
        assert text.startswith('{"name": "f", "parameters": {"a": {"type": "int"}}}\n')


@pytest.mark.parametrize(
    "messages, more",
    [
        ([USER, {**ANSWER, "reasoning_content": "hm"}, USER, ANSWER], {}),  # dropped from earlier turns by design
        ([USER, calling(call({})), {**TOOL, "name": "warmth"}, ANSWER], {}),  # ids and names that link calls
        ([USER, {**ANSWER, "tool_calls": [], "refusal": None, "audio": "", "weight": 1}], {}),  # nothing to say
        ([USER, ANSWER], {"chat_template_kwargs": {"loud": False, "quiet": None}, "tools": []}),  # a switch that is off
        ([message("user", ""), ANSWER], {}),
    ],
)
def test_no_false_alarms(messages, more):
    assert rendered(WITH_TOOLS, *messages, **more)


def test_text_parts_are_taken():
    parts = [{"type": "text", "text": "ho", "image": None}, {"type": "text", "text": "w?"}]
    joins = "(m.content if m.content is string else m.content | map(attribute='text') | join('+'))"
    for content, text in (("m.content", "how?"), (joins, "ho+w?"), ("m.content | string", "how?")):
        got = rendered(CHATML.replace("m.content", content), message("user", parts), ANSWER)
        assert f"user\n{text}<|im_end|>" in got


def test_alike_messages_are_tried_once(monkeypatch):
    tokenizer, count = tokenizer_with(CHATML), []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: count.append(1) or render(*a, **k))
    rows = [{"messages": [message("user", str(i)), ANSWER]} for i in range(200)]
    prepare(Rows("data", rows), Kind.SEQUENCE, tokenizer)
    assert 200 < len(count) <= 210
