"""The chat template that a run is told to use, and the values that it is told to give it."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from logratio.trainers.config import DataConfig
from logratio.trainers.errors import UserError
from logratio.trainers.loop import train_run
from logratio.trainers.options import parse_train
from logratio.trainers.policy.template import with_template
from logratio.trainers.policy.tiny import CHAT_TEMPLATE, tiny_tokenizer
from logratio.trainers.setup import build

QWEN3 = """
{%- macro turn(m) -%}<|im_start|>{{ m.role }}
{{ m.content }}{{ mark }}<|im_end|>{%- endmacro -%}
{%- for m in messages %}{{ turn(m) }}
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{%- endif -%}"""
ASKED = [{"role": "user", "content": "1+1"}]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rendered(tokenizer, **options):
    return tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True, **options)


def template_file(text=QWEN3, name="own.jinja"):
    Path(name).write_text(text)
    return name


def test_a_files_template_is_taken_and_the_callers_tokenizer_left_alone():
    ours = tiny_tokenizer()
    tokenizer, notes = with_template(ours, template_file(), {})
    assert (tokenizer.chat_template, notes) == (QWEN3, [])
    assert ours.chat_template == CHAT_TEMPLATE and tokenizer.get_vocab() == ours.get_vocab()
    assert with_template(ours, None, {})[0] is ours


def test_values_are_the_templates_defaults_which_whoever_calls_goes_before():
    """And nothing else of the text changes: its first line break, what macros read, what is not given."""
    values = {"enable_thinking": False, "mark": "'\"{% %}\\n"}
    plain, _ = with_template(tiny_tokenizer(), template_file(), {})
    tokenizer, _ = with_template(tiny_tokenizer(), template_file(), values)
    assert rendered(tokenizer) == rendered(plain, **values) != rendered(plain)
    assert rendered(tokenizer, enable_thinking=True, mark="") == rendered(plain)
    again, _ = with_template(tokenizer, None, {"enable_thinking": True, "mark": ""})  # a run that goes on from it
    assert rendered(again) == rendered(plain)


@pytest.mark.parametrize("value", [None, True, 3, -1.5e-7, "ä\n", ["a", {"b": None}], {"k": [1, "}}"]}])
def test_values_of_all_kinds_arrive_as_they_are(value):
    path = template_file("\n{{ x | tojson }}{{ messages[-1].content }}<|im_end|>")
    tokenizer, _ = with_template(tiny_tokenizer(), path, {"x": value})
    assert rendered(tokenizer) == f"\n{json.dumps(value, ensure_ascii=False)}1+1<|im_end|>"


def test_one_of_several_templates_may_read_it():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": QWEN3, "tool_use": CHAT_TEMPLATE}
    tokenizer, _ = with_template(tokenizer, None, {"enable_thinking": False})
    assert "<think>" in rendered(tokenizer) and "<think>" not in rendered(tokenizer, chat_template="tool_use")


def test_a_tokenizers_template_is_taken_where_the_model_has_its_tokens():
    theirs = tiny_tokenizer()
    theirs.chat_template = QWEN3
    theirs.save_pretrained("theirs")
    bare = tiny_tokenizer()
    bare.chat_template = None
    assert with_template(bare, "theirs", {})[0].chat_template == QWEN3
    theirs.add_tokens(["<think>", "<unused>"])
    theirs.chat_template = QWEN3.replace("{{ mark }}", "<think>")
    theirs.save_pretrained("theirs")
    with pytest.raises(UserError) as told:
        with_template(bare, "theirs", {})
    assert str(told.value) == (
        "--chat_template_path theirs writes <think>, which the model's tokenizer does not have: use a "
        "template of tokens that it has, or add these to it and to the model's embeddings beforehand"
    )


def test_a_template_that_never_ends_is_told():
    path = template_file("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "words.j2")
    _, notes = with_template(tiny_tokenizer(), path, {})
    assert notes == [
        f"--chat_template_path {path} closes an answer with no token of its own: nothing teaches the model where to end"
    ]


@pytest.mark.parametrize(
    "path, text, values, said",
    [
        ("gone.jinja", None, {}, "--chat_template_path gone.jinja cannot be read: No such file or directory"),
        ("latin.jinja", b"\xe4", {}, "--chat_template_path latin.jinja cannot be read: it is no UTF-8"),
        (
            "bad.jinja",
            b"\n{% for m in messages %}",
            {},
            "--chat_template_path bad.jinja, line 2: Unexpected end of template. Jinja was looking for the following "
            "tags: 'endfor' or 'else'. The innermost block that needs to be closed is 'for'",
        ),
        (
            "no.txt",
            b"{{ raise_exception('no') }}",
            {},
            "--chat_template_path no.txt: the template renders no conversation of a question and an answer",
        ),
        (
            "all.jinja",
            b"{{ messages[-1].content }}{% if tools or documents %}{{ raise_exception(eos_token) }}{% endif %}",
            {"documents": [], "thinking": 1, "a b": 2, "tools": [], "eos_token": "x", "raise_exception": 1},
            "--chat_template_kwargs has a b, documents, eos_token, raise_exception, thinking, tools, which the chat "
            "template does not read; it reads nothing of the kind",
        ),
        (
            "q.jinja",
            QWEN3.encode(),
            {"thinking": 1},
            "--chat_template_kwargs has thinking, which the chat template does not read; it reads enable_thinking, "
            "mark",
        ),
        (
            "q.jinja",
            QWEN3.encode(),
            {"mark": "\ud800"},
            "--chat_template_kwargs has half of a surrogate pair, \\ud800, at character 0, which is no text: the other "
            "half of the character was cut off; mend or remove the row",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(path, text, values, said):
    if text is not None:
        Path(path).write_bytes(text)
    with pytest.raises(UserError) as told:
        with_template(tiny_tokenizer(), path, values)
    assert str(told.value) == said


def test_a_tokenizer_without_a_template_has_nothing_to_give_values_to():
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="the tokenizer has no chat template to give them to; name one"):
        with_template(bare, None, {"x": 1})
    bare.save_pretrained("bare")
    with pytest.raises(UserError, match="--chat_template_path bare: that tokenizer has no chat template"):
        with_template(tiny_tokenizer(), "bare", {})
    with pytest.raises(UserError, match=r"--chat_template_path is no .jinja file: no tokenizer could be loaded from"):
        with_template(tiny_tokenizer(), "./nowhere", {})


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": NaN}', "3"])
def test_values_are_a_json_object(text):
    with pytest.raises(UserError) as told:
        DataConfig(chat_template_kwargs=text)
    assert str(told.value) == f"--chat_template_kwargs {text} is no JSON object"


def test_yaml_gives_a_mapping_and_dates_as_they_are_written():
    Path("own.yaml").write_text("batch_size: 2\nchat_template_kwargs:\n  date_string: 2024-07-26\n  n: 1\n")
    config = parse_train(["sft", "--config", "own.yaml"])
    assert config.data.template_values == {"date_string": "2024-07-26", "n": 1}


def test_a_run_trains_and_saves_what_it_was_told():
    """The row's own value goes before the run's; the saved tokenizer writes what was trained."""
    template_file()
    rows = [{"messages": [*ASKED, {"role": "assistant", "content": "2"}]} for _ in range(2)]
    rows[1]["chat_template_kwargs"] = {"mark": "of its own"}
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--chat_template_path", "own.jinja", "--chat_template_kwargs", '{"mark": "of the run"}']
    run = build(parse_train(["sft", "--dataset_name", "rows.jsonl", "--output_dir", "out", "--max_steps", "1", *words]))
    texts = [run.tokenizer.decode(example.completions[0].ids) for example in run.data.train]
    assert ["1+1of the run" in text for text in texts] == ["2of the run" in text for text in texts] == [True, False]
    assert ["1+1of its own" in text for text in texts] == [False, True]
    train_run(run, quiet=True)
    saved = AutoTokenizer.from_pretrained("out")
    assert rendered(saved) == rendered(run.tokenizer) and "1+1of the run<|im_end|>" in rendered(saved)
