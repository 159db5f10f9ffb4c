"""Conversations in other shapes become messages, or are refused; so is what their templates must not be given."""

import json

import pytest

from logratio.losses import Kind
from logratio.trainers.data.chat.conversations import DEEPEST, check_value, messages_in
from logratio.trainers.data.columns import read_sources
from logratio.trainers.data.examples import Rows, load_rows, prepare, prepare_prompts
from logratio.trainers.data.layout import find_layout
from logratio.trainers.data.report import Report
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PLACE = r"data, row 0 \(counted from 0\)"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def source(row, kind=Kind.SEQUENCE):
    """The row as it is before it is tokenized."""
    bad = Report(Rows("data", [row]))
    return next(read_sources(bad, find_layout(bad, kind)))


def ids(row, kind=Kind.SEQUENCE):
    examples, _ = prepare(Rows("data", [row]), kind, TOKENIZER)
    return [(example.prompt_ids, example.completions) for example in examples]


CHAT = [user("q"), assistant("a")]


# --- JSON in a string


@pytest.mark.parametrize(
    "kind, row",
    [
        (Kind.SEQUENCE, {"messages": CHAT}),
        (Kind.SEQUENCE, {"prompt": CHAT[:1], "completion": CHAT[1:]}),
        (Kind.PAIRED, {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [assistant("b")]}),
        (Kind.PAIRED, {"chosen": CHAT, "rejected": [user("q"), assistant("b")]}),
    ],
)
def test_messages_as_json_give_the_ids_of_the_messages(kind, row):
    written = {column: json.dumps(value) for column, value in row.items()}
    assert ids(written, kind) == ids(row, kind)
    assert ids({**row, "messages": written["messages"]} if "messages" in row else row, kind) == ids(row, kind)


def test_a_prompt_as_json_is_a_conversation_to_answer():
    (prompt,), _ = prepare_prompts(Rows("data", [{"prompt": json.dumps(CHAT[:1])}]), TOKENIZER)
    assert prompt.prompt == CHAT[:1]


@pytest.mark.parametrize(
    "text", ["[", "[]", "[1, 2]", "[INST] hello [/INST]", "[citation needed]", '[{"a": 1}]', "[" * 999]
)
def test_plain_text_in_brackets_stays_text(text):
    assert messages_in(text) is None
    (found,) = ids({"prompt": text, "completion": "a"})
    assert TOKENIZER.decode(found[0]) == text
    assert source({"text": text}).completions == [text]


def test_a_completion_that_is_json_stays_text_behind_a_prompt_that_is_text():
    written = json.dumps(CHAT)
    assert source({"prompt": "Write a dialogue.", "completion": written}).completions == [written]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": "hello"}, "'messages' must be a list of messages, got str 'hello'"),
        ({"messages": str(CHAT)}, "'messages' must be a list of messages, got str"),
        ({"messages": json.dumps(CHAT)[:-9]}, "'messages' must be a list of messages, got str"),
        ({"messages": {"a": 1}}, "'messages' must be a list of messages, got dict"),
        ({"prompt": str(CHAT[:1]), "completion": "a"}, "'prompt' must be a list of messages, as in the first row, got"),
        ({"prompt": json.dumps(CHAT[:1]), "completion": "a"}, "'completion' must be a list of messages, as in the"),
        ({"text": json.dumps(CHAT)}, "'text' is a list of messages written out: call the column 'messages'"),
        ({"text": str(CHAT)}, "'text' is a list of messages written out"),
    ],
)
def test_other_strings_in_the_place_of_messages_are_refused(row, message):
    with pytest.raises(UserError, match=f"{PLACE}:? {message}"):
        prepare(Rows("data", [row]), Kind.SEQUENCE, TOKENIZER)


def test_messages_as_json_among_plain_prompts_are_refused():
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": json.dumps(CHAT[:1]), "completion": "a"}]
    with pytest.raises(
        UserError, match="row 1 .*'prompt' must be text or a list of messages, and the same in all rows"
    ):
        prepare(Rows("data", rows), Kind.SEQUENCE, TOKENIZER)


# --- ShareGPT


def test_sharegpt_becomes_messages():
    row = {"conversations": [{"from": "system", "value": "s"}, human("q"), {**gpt("a"), "weight": 0}]}
    assert source(row).completions == [[{"role": "system", "content": "s"}, user("q"), {**assistant("a"), "weight": 0}]]
    assert ids({"conversations": [human("q"), gpt("a")]}) == ids({"messages": CHAT})
    assert ids({"conversations": CHAT}) == ids({"messages": CHAT})
    assert ids({"messages": [human("q"), gpt("a")]}) == ids({"messages": CHAT})
    assert ids({"conversations": json.dumps([human("q"), gpt("a")])}) == ids({"messages": CHAT})


def test_sharegpt_tools():
    call = '{"name": "warmth", "arguments": {"place": "Graz"}}'
    turns = [human("q"), {"from": "function_call", "value": call}, {"from": "observation", "value": "20"}, gpt("a")]
    (messages,) = source({"conversations": turns}).completions
    assert messages == [
        user("q"),
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "warmth", "arguments": {"place": "Graz"}}}],
        },
        {"role": "tool", "content": "20"},
        assistant("a"),
    ]
    turns[1]["value"] = f"[{call}, {call}]"
    assert len(source({"conversations": turns}).completions[0][1]["tool_calls"]) == 2


def test_sharegpt_pairs_answer_the_conversation():
    row = {"conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")}
    plain = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert ids(row, Kind.PAIRED) == ids(plain, Kind.PAIRED)
    assert ids(row, Kind.LABELED) == ids(plain, Kind.LABELED)


def test_a_system_column_belongs_to_sharegpt_only():
    system = {"role": "system", "content": "s"}
    turns = [human("q"), gpt("a")]
    assert source({"conversations": turns, "system": "s"}).completions[0] == [system, *CHAT]
    assert source({"conversations": [system, *turns], "system": "s"}).completions[0] == [system, *CHAT]
    assert source({"conversations": turns, "system": ""}).completions[0] == CHAT
    assert source({"messages": CHAT, "system": "s"}).completions[0] == CHAT
    with pytest.raises(UserError, match=f"{PLACE} has a column 'system' and another system turn"):
        source({"conversations": [system, *turns], "system": "other"})
    with pytest.raises(UserError, match=f"{PLACE}: 'system' must be text, got int 3"):
        source({"conversations": turns, "system": 3})


@pytest.mark.parametrize(
    "turn, message",
    [
        ({"from": "bing", "value": "a"}, "message 1 is from str 'bing', expected one of human, user, gpt"),
        ({"from": None, "value": "a"}, "message 1 is from NoneType None, expected"),
        ({"from": ["gpt"], "value": "a"}, "message 1 is from list"),
        ({"from": "gpt"}, "message 1 must be an object with 'role' and 'content'"),
        ({"from": "gpt", "value": None}, "message 1 must have text as its 'content'"),
        ({"from": "function_call", "value": "f()"}, "message 1 is a function_call that is no JSON object with 'name'"),
        ({"from": "function_call", "value": '{"name": "f"}'}, "message 1 is a function_call that is no JSON object"),
        ({"from": "function_call", "value": "[]"}, "message 1 is a function_call"),
    ],
)
def test_unclear_turns_are_refused(turn, message):
    with pytest.raises(UserError, match=f"{PLACE}: 'conversations', {message}"):
        source({"conversations": [human("q"), turn]})


# --- columns that contradict each other


def test_a_prompt_that_the_answers_repeat_says_what_to_remove():
    pair = {"chosen": CHAT, "rejected": [user("q"), assistant("b")]}
    with pytest.raises(
        UserError,
        match=f"{PLACE}: 'prompt' is text, 'chosen' a conversation, which begins with it: remove the column 'prompt'",
    ):
        source({"prompt": "q", **pair}, Kind.PAIRED)
    with pytest.raises(
        UserError, match=f"{PLACE}: 'prompt' is text, 'chosen' a conversation, give the prompt as messages"
    ):
        source({"prompt": "other", **pair}, Kind.PAIRED)
    with pytest.raises(UserError, match=f"{PLACE}: 'chosen' begins with the prompt's messages again"):
        source({"prompt": [user("q")], **pair}, Kind.PAIRED)
    assert source(pair, Kind.PAIRED).prompt == [user("q")]


def test_columns_that_only_later_rows_have_are_not_passed_over():
    rows = [{"chosen": "q a", "rejected": "q b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    with pytest.raises(UserError, match="row 1 .* has 'prompt', which the first row lacks and which would not be read"):
        prepare(Rows("data", rows), Kind.PAIRED, TOKENIZER)


@pytest.mark.parametrize("name", ["completions", "prompts", "completion_ids", "trainer_state"])
def test_a_column_called_as_what_rewards_are_given_is_refused(name):
    with pytest.raises(
        UserError, match=f"data has the column '{name}', a name by which rewards are given something else"
    ):
        prepare_prompts(Rows("data", [{"prompt": "q", name: 1}]), TOKENIZER)
    assert prepare(Rows("data", [{"prompt": "q", "completion": "a", name: 1}]), Kind.SEQUENCE, TOKENIZER)


@pytest.mark.parametrize("label", [1, 0, "True", "false", 1.0, [True], None])
def test_labels_are_true_or_false(label, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = {"prompt": "q", "completion": "a", "label": True}
    path.write_text("\n".join(map(json.dumps, [good, {**good, "label": label}])))
    with pytest.raises(UserError, match="rows.jsonl, line 2(: 'label' must be true or false, got| lacks 'label')"):
        prepare(load_rows(str(path), Kind.LABELED), Kind.LABELED, TOKENIZER)


# --- text that is none, and what templates are given


@pytest.mark.parametrize(
    "kind, row",
    [
        (Kind.SEQUENCE, {"text": "a\ud83d"}),
        (Kind.SEQUENCE, {"prompt": "\udc00", "completion": "a"}),
        (Kind.SEQUENCE, {"messages": [user("q"), assistant("a\ud83d")]}),
        (Kind.SEQUENCE, {"messages": json.dumps([user("q"), assistant("a\ud83d")])}),
        (Kind.SEQUENCE, {"messages": [user("q"), {**assistant("a"), "thinking": "\ud83d"}]}),
        (Kind.SEQUENCE, {"messages": CHAT, "tools": [{"name": "\ud83d"}]}),
        (Kind.SEQUENCE, {"messages": CHAT, "chat_template_kwargs": {"\ud83d": 1}}),
        (Kind.PAIRED, {"chosen": "q a", "rejected": "q \ud83d"}),
        (Kind.GROUPED, {"prompt": "\ud83d"}),
    ],
)
def test_half_of_a_surrogate_pair_is_named_with_its_column(kind, row):
    with pytest.raises(UserError, match=rf"{PLACE}: '\w+' has half of a surrogate pair, .u(d83d|dc00), at character"):
        prepare_prompts(Rows("data", [row]), TOKENIZER) if kind == Kind.GROUPED else prepare(
            Rows("data", [row]), kind, TOKENIZER
        )


def test_a_whole_pair_written_as_two_escapes_is_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "\\ud83d\\ude00"}')
    assert prepare(load_rows(str(tmp_path / "rows.jsonl"), Kind.SEQUENCE), Kind.SEQUENCE, TOKENIZER)[1].examples == 1


def nested(depth):
    value = "a"
    for _ in range(depth):
        value = [value]
    return value


def test_depth_and_digits_have_an_end():
    check_value(nested(DEEPEST - 1), "here")
    check_value(10**4000 - 1, "here")
    for value, message in (
        (nested(DEEPEST), "is nested more than 64 levels deep"),
        (nested(50_000), "is nested more than 64 levels deep"),
        ([10**4000], "has a number of too many digits"),
        ([{3: 1}], "has an object with a key that is no text: dict {3: 1}"),
    ):
        with pytest.raises(UserError, match=f"^here {message}"):
            check_value(value, "here")


OURS = (
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "return_dict",
    "messages",
    "self",
)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tools": '{"name": "f"}'}, "'tools' must be a list of tools, got dict"),
        ({"tools": {"name": "f"}}, "'tools' must be a list of tools, got dict"),
        ({"tools": ["f"]}, "'tools' must be a list of tools, each an object, got str 'f' in it"),
        ({"tools": "[}"}, "'tools' is not valid JSON: Expecting value"),
        ({"tools": "[" * 100_000}, "'tools' is not valid JSON: is nested too deeply"),
        ({"tools": 3}, "'tools' must be a list of tools, got int 3"),
        ({"chat_template_kwargs": ["mood"]}, "'chat_template_kwargs' must be an object of options .*, got list"),
        ({"chat_template_kwargs": "mood"}, "'chat_template_kwargs' is not valid JSON"),
        ({"chat_template_kwargs": {"tools": []}}, "'chat_template_kwargs' has 'tools', .*: give them in a column"),
        (
            {"chat_template_kwargs": {"documents": 0}},
            "'documents' in 'chat_template_kwargs' must be a list of objects",
        ),
        (
            {"chat_template_kwargs": {"documents": [1]}},
            "'documents' in 'chat_template_kwargs' must be a list of objects",
        ),
        *(
            (
                {"chat_template_kwargs": {name: True}},
                f"'chat_template_kwargs' has '{name}', which is not the row's to set",
            )
            for name in OURS
        ),
    ],
)
def test_what_a_template_cannot_be_given_is_refused(options, message):
    with pytest.raises(UserError, match=f"{PLACE}: {message}"):
        source({"messages": CHAT, **options})


def test_what_a_template_can_be_given_is():
    tools = [{"name": "f"}]
    for given in (tools, json.dumps(tools)):
        assert source({"messages": CHAT, "tools": given}).options == {"tools": tools}
    for given in ({"mood": 1, "other": None}, '{"mood": 1}'):
        assert source({"messages": CHAT, "chat_template_kwargs": given}).options == {"mood": 1}
    for nothing in (None, "", " ", "null", [], "[]"):
        assert source({"messages": CHAT, "tools": nothing}).options == {}
    # nobody reads them beside plain text
    assert source({"text": "a", "tools": 3, "chat_template_kwargs": [1]}).options == {}
