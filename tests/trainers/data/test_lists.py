"""Rows of lists: what they become, and the sentence of each that cannot be used."""

import json
import math
import re

import pytest

from logratio.losses import Kind
from logratio.trainers.data.examples import Rows, prepare
from logratio.trainers.data.layout import remedy_of
from logratio.trainers.data.rows import load_rows
from logratio.trainers.data.sample import sample
from logratio.trainers.data.table.making import make_table
from logratio.trainers.data.table.stored import Table
from logratio.trainers.data.tasks.arithmetic import arithmetic_rows
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
GOOD = {"prompt": "q:", "completions": ["a", "bc"], "rewards": [1, 0.5]}


def ids(text):
    return TOKENIZER(text)["input_ids"]


def prepared(rows, **options):
    return prepare(Rows("data", rows), Kind.LISTED, TOKENIZER, **options)


def turns(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]


def test_lists_may_be_of_different_sizes():
    long = {"prompt": "r:", "completions": ["d", "e", "d", "ff"], "rewards": [-1, 2.5, 0, 0]}
    (two, four), report = prepared([GOOD, long])
    assert two.prompt_ids == ids("q:") and [c.ids for c in two.completions] == [[*ids(x), EOS] for x in ("a", "bc")]
    assert two.rewards == (1.0, 0.5) and two.label is None and two.row == 0
    assert four.rewards == (-1.0, 2.5, 0.0, 0.0) and len(four.completions) == 4
    assert str(report) == "data: 2 examples"  # two completions may be alike
    assert four.take([3, 1]).rewards == (0.0, 2.5)


def test_a_prompt_that_all_begin_with():
    row = {"completions": ["say: one", "say: once", "say: two"], "rewards": [1, 0, 0]}
    ((example,), _), ((explicit,), _) = (
        prepared([one]) for one in (row, {**row, "prompt": "say:", "completions": [" one", " once", " two"]})
    )
    assert example.prompt_ids == explicit.prompt_ids == ids("say:")
    assert [c.ids for c in example.completions] == [c.ids for c in explicit.completions]


def test_conversations(tmp_path):
    question, answers = turns("2 + 2?"), [turns("", text)[1:] for text in ("4", "5", "22")]
    apart = {"prompt": question, "completions": answers, "rewards": [1, 0, 0]}
    whole = {"completions": [question + answer for answer in answers], "rewards": [1, 0, 0]}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(apart) + "\n")
    made = [
        prepare(rows, Kind.LISTED, tokenizer)[0][0] for rows in (load_rows(str(path), Kind.LISTED), Rows("x", [whole]))
    ]
    assert made[0] == made[1] and len(made[0].completions) == 3
    assert tokenizer.decode(made[0].prompt_ids).endswith("<assistant>")


def test_completions_are_cut_and_long_prompts_dropped():
    (example,), report = prepared([GOOD, {**GOOD, "prompt": "much too long"}], max_length=4)
    assert [len(c.ids) for c in example.completions] == [2, 2] and example.rewards == (1.0, 0.5)
    assert (report.truncated, report.tokens_cut, report.dropped) == (1, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1]}, " has 2 completions and 1 rewards: give one reward for each completion"),
        (
            {"completions": ["a"], "rewards": [1]},
            ": 'completions' has fewer than two, and nothing can be compared: add completions of the same prompt or "
            "remove the row",
        ),
        ({"rewards": [1, math.nan]}, ": 'rewards[1]' must be a finite number, got float nan"),
        ({"rewards": [-math.inf, 1]}, ": 'rewards[0]' must be a finite number, got float -inf"),
        ({"rewards": [10**400, 1]}, ": 'rewards[0]' must be a finite number, got int 1" + 56 * "0" + "..."),
        ({"rewards": [True, 0]}, ": 'rewards[0]' must be a finite number, got bool True"),
        ({"rewards": ["1", 0]}, ": 'rewards[0]' must be a finite number, got str '1'"),
        ({"rewards": 1}, ": 'rewards' must be a list of numbers, one for each completion, got int 1"),
        ({"rewards": None}, " lacks 'rewards', which the first row has: fill it in or remove the row"),
        ({"completions": ["a", " "]}, ": 'completions[1]' has no text to learn from: fill it in or remove the row"),
        (
            {"completions": ["a", 3]},
            ": 'completions[1]' must be text or a list of messages, and the same in all rows, got int 3",
        ),
        (
            {"completions": "ab"},
            ": 'completions' must be a list of texts or of conversations, which are lists of messages themselves, got "
            "str 'ab'",
        ),
        ({"prompt": None}, " lacks 'prompt', which the first row has: fill it in or remove the row"),
    ],
)
def test_a_bad_row_is_named(change, message):
    bad = {**GOOD, **change}
    place = "data, row 1 (counted from 0)"
    with pytest.raises(UserError, match=f"^{re.escape(place + message)}$"):
        prepared([GOOD, bad])
    (example,), report = prepared([GOOD, bad], on_bad_row="skip")
    assert example.rewards == (1.0, 0.5) and [one["row"] for one in report.skipped] == [1]


def test_one_conversation_is_no_list_of_completions():
    rows = [{"completions": turns("2 + 2?", "4"), "rewards": [1, 0]}]
    with pytest.raises(UserError, match=r"row 0 .*: 'completions' must be a list of texts or of conversations"):
        prepared(rows)


def test_columns_that_are_another_methods():
    assert remedy_of(GOOD, Kind.PAIRED) == "; these are listwise's columns: logratio train listwise"
    row = {"prompt": "a", "completion": "b"}
    assert remedy_of(row, Kind.LISTED) == "; these are sft's columns: logratio train sft"
    row = {"prompt": "a", "completions": "b"}
    assert remedy_of(row, Kind.SEQUENCE) == "; is 'completions' meant to be 'completion'? then rename it"
    with pytest.raises(UserError, match="expected prompt and completions and rewards, or completions and rewards"):
        prepared([{"prompt": "a"}])


def test_a_table_keeps_the_rewards(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    rows = Rows("data", [GOOD, {**GOOD, "completions": ["x", "y", "z"], "rewards": [0.1, -3, 1e-9]}])
    path, _ = make_table(rows, Kind.LISTED, TOKENIZER, max_length=99)
    table = Table(path)
    assert [table[i] for i in range(2)] == prepared(rows.rows)[0]


def test_the_best_and_the_worst_are_shown():
    (example,), _ = prepared([{**GOOD, "completions": ["a", "b", "c"], "rewards": [0.5, 1, -0.25]}])
    assert sample(example, TOKENIZER) == [("row 0", "q:"), ("reward 1", "b"), ("reward -0.25", "c")]


def test_the_embedded_task_has_lists():
    for row in arithmetic_rows(Kind.LISTED)[:50]:
        a, b = map(int, row["prompt"].rstrip("=").split("+"))
        assert row["rewards"] == [1 - abs(int(answer) - a - b) / 10 for answer in row["completions"]]
        assert len(set(row["completions"])) == 3 and row["rewards"][0] == 1
