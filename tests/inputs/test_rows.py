"""Rows that people really have: what cannot be used is named by its line, what can be is trained on."""

import json

import pytest

GOOD = {"prompt": "1+1=", "completion": "2"}
PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
USER, ANSWER = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}
CHAT = {"messages": [USER, ANSWER]}
DEEP = "[" * 100_000 + "]" * 100_000

# method, the good first row (or None), the bad row (text: a line as it stands), what the sentence names beside line 2
BAD = {
    "no completion": ("sft", GOOD, {"prompt": "1+1="}, "completion"),
    "null completion": ("sft", GOOD, {"prompt": "1+1=", "completion": None}, "completion"),
    "number for text": ("sft", GOOD, {"prompt": "1+1=", "completion": 2}, "completion"),
    "list for text": ("sft", GOOD, {"prompt": "1+1=", "completion": ["2"]}, "completion"),
    "empty completion": ("sft", GOOD, {"prompt": "1+1=", "completion": ""}, "completion"),
    "blank completion": ("sft", GOOD, {"prompt": "1+1=", "completion": " \n"}, "completion"),
    "object for a row": ("sft", GOOD, "[1, 2]", "one object"),
    "number for a row": ("sft", GOOD, "7", "one object"),
    "not JSON": ("sft", GOOD, '{"prompt": "1+1=", "completion": ', "not valid JSON"),
    "two objects": ("sft", GOOD, '{"prompt": "a"} {"prompt": "b"}', "not valid JSON"),
    "single quotes": ("sft", GOOD, "{'prompt': 'a', 'completion': 'b'}", "not valid JSON"),
    "100,000 brackets": ("sft", GOOD, f'{{"prompt": {DEEP}, "completion": "2"}}', ""),
    "5,000 digits": ("sft", GOOD, f'{{"prompt": "a", "completion": "b", "weight": {"9" * 5000}}}', ""),
    "half a surrogate": ("sft", GOOD, r'{"prompt": "1+1=", "completion": "2\ud83d"}', "surrogate"),
    "weight of text": ("sft", GOOD, {**GOOD, "weight": "1"}, "weight"),
    "weight below 0": ("sft", GOOD, {**GOOD, "weight": -1}, "weight"),
    "weight NaN": ("sft", GOOD, '{"prompt": "1+1=", "completion": "2", "weight": NaN}', "weight"),
    "text beside messages": ("sft", CHAT, {"messages": "hello"}, "messages"),
    "empty messages": ("sft", CHAT, {"messages": []}, "messages"),
    "no role": ("sft", CHAT, {"messages": [{"content": "a"}, ANSWER]}, "role"),
    "number as role": ("sft", CHAT, {"messages": [{"role": 1, "content": "a"}, ANSWER]}, "role"),
    "number as content": ("sft", CHAT, {"messages": [USER, {"role": "assistant", "content": 2}]}, "content"),
    "no answer": ("sft", CHAT, {"messages": [USER]}, "assistant"),
    "empty answer": ("sft", CHAT, {"messages": [USER, {"role": "assistant", "content": " "}]}, "assistant"),
    "a string among messages": ("sft", CHAT, {"messages": [USER, "2"]}, "messages"),
    "an image": ("sft", CHAT, {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, ""),
    "tools nobody renders": (
        "sft",
        CHAT,
        {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]},
        "tools",
    ),
    "tools of a wrong type": ("sft", CHAT, {**CHAT, "tools": {"name": "f"}}, "tools"),
    "tools of broken JSON": ("sft", CHAT, {**CHAT, "tools": "[{"}, "tools"),
    "template options as a list": ("sft", CHAT, {**CHAT, "chat_template_kwargs": ["a"]}, "chat_template_kwargs"),
    "template options of ours": ("sft", CHAT, {**CHAT, "chat_template_kwargs": {"tokenize": False}}, "tokenize"),
    "no rejected": ("dpo", PAIR, {"prompt": "1+1=", "chosen": "2"}, "rejected"),
    "empty rejected": ("dpo", PAIR, {**PAIR, "rejected": ""}, "rejected"),
    "boolean chosen": ("dpo", PAIR, {**PAIR, "chosen": True}, "chosen"),
    "conversation beside text": ("dpo", PAIR, {**PAIR, "chosen": [ANSWER]}, "chosen"),
    "label 1": ("kto", {**GOOD, "label": True}, {**GOOD, "label": 1}, "label"),
    "label text": ("kto", {**GOOD, "label": True}, {**GOOD, "label": "True"}, "label"),
    "no label": ("kto", {**GOOD, "label": True}, GOOD, "label"),
    "no gold": ("tpo", {**PAIR, "reference": "2"}, PAIR, "reference"),
    "no prompt": ("grpo", {"prompt": "1+1=", "answer": "2"}, {"prompt": None, "answer": "2"}, "prompt"),
    "another column": ("grpo", {"prompt": "1+1=", "answer": "2"}, {"prompt": "1+1=", "other": "2"}, "columns"),
}
ODD = {
    "two user turns": ("sft", {"messages": [USER, USER, ANSWER]}),
    "greeting first": ("sft", {"messages": [{"role": "assistant", "content": "Hello."}, USER, ANSWER]}),
    "system first": ("sft", {"messages": [{"role": "system", "content": "Add."}, USER, ANSWER]}),
    "messages in a string": ("sft", {"messages": json.dumps([USER, ANSWER])}),
    "share gpt": ("sft", {"conversations": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]}),
    "text that begins with a bracket": ("sft", {"text": "[1, 2] is a list"}),
    "text that is a JSON list": ("sft", {"text": '["a", "b"]'}),
    "null columns": ("sft", {**GOOD, "weight": None, "tools": None}),
    "other columns": ("sft", {**GOOD, "id": 7, "source": {"a": [1]}}),
    "NUL and emoji": ("sft", {"prompt": "a\x00b", "completion": "\U0001f600 \u202e"}),
    "special tokens in the text": ("sft", {"prompt": "a", "completion": "<|endoftext|> b"}),
    "identical pair": ("dpo", {**PAIR, "rejected": "2"}),
    "prompt in both": ("dpo", {"chosen": "1+1=2", "rejected": "1+1=3"}),
    "conversations": ("dpo", {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "3"}]}),
    "pairs for kto": ("kto", PAIR),
    "parts of text": ("sft", {"messages": [{"role": "user", "content": [{"type": "text", "text": "1+1="}]}, ANSWER]}),
}
WHOLE = {
    "ultrafeedback": (
        "dpo",
        {"prompt": "1+1=", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "3"}]},
        "prompt",
    ),
    "no known column": ("sft", {"question": "1+1=", "answer": "2"}, "question"),
    "pairs for sft": ("sft", PAIR, "completion"),
    "prompts for dpo": ("dpo", {"prompt": "1+1="}, "chosen"),
    "a column of the rewards' own": ("grpo", {"prompt": "1+1=", "answer": "2", "completions": "2"}, "completions"),
}


def line(row):
    return row if isinstance(row, str) else json.dumps(row)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_its_line(refused, tmp_path, name):
    method, good, bad, names = BAD[name]
    (tmp_path / "rows.jsonl").write_text(f"{line(good)}\n{line(bad)}\n{line(good)}\n")
    refused(f"train {method} --dataset_name rows.jsonl --max_steps 1 --batch_size 2", "rows.jsonl, line 2", names)


@pytest.mark.parametrize(
    "name", ["no completion", "half a surrogate", "no answer", "no label", "not JSON", "empty rejected"]
)
def test_a_bad_row_is_skipped_where_asked(run, tmp_path, name):
    method, good, bad, names = BAD[name]
    (tmp_path / "rows.jsonl").write_text(f"{line(good)}\n{line(bad)}\n{line(good)}\n{line(good)}\n")
    words = "--dataset_name rows.jsonl --max_steps 1 --batch_size 3 --output_dir out --on_bad_row skip"
    said = run(f"train {method} {words}")
    assert said.status == 0, said
    assert "1 row skipped" in said.output
    (skipped,) = [json.loads(x) for x in (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    assert (skipped["line"], skipped["row"]) == (2, 1) and names in skipped["reason"]


@pytest.mark.parametrize("name", ODD)
def test_an_odd_row_trains(run, tmp_path, name):
    method, row = ODD[name]
    (tmp_path / "rows.jsonl").write_text(f"{line(row)}\n{line(row)}\n")
    said = run(f"train {method} --dataset_name rows.jsonl --max_steps 1 --batch_size 2 --output_dir out")
    assert said.status == 0, said
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", WHOLE)
def test_columns_that_do_not_fit_the_method(refused, tmp_path, name):
    method, row, names = WHOLE[name]
    (tmp_path / "rows.jsonl").write_text(f"{line(row)}\n{line(row)}\n")
    refused(f"train {method} --dataset_name rows.jsonl --max_steps 1 --batch_size 2", "rows.jsonl", names)
