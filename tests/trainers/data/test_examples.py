"""Where rows come from, what truncation takes, and the one sentence that a bad row ends in."""

import json

import datasets
import numpy as np
import pytest

from logratio.losses import Kind
from logratio.trainers.data.examples import Completion, Example, Rows, load_rows, prepare, prepare_prompts
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
PAIRS = [{"prompt": "a", "chosen": "b", "rejected": "c"}]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def prepared(rows, kind, **options):
    return prepare(Rows("data", rows), kind, TOKENIZER, **options)


def write_lines(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


# --- where rows come from


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", " list.json"])
def test_a_file_of_each_type_gives_its_rows(suffix, tmp_path):
    path = tmp_path / f"pairs{suffix}"
    rows = [*PAIRS, {"prompt": "d\u2028", "chosen": "e", "rejected": "f"}]
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif suffix == " list.json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert list(load_rows(str(path), Kind.PAIRED)) == rows


def test_a_folder_gives_the_split_asked_for(tmp_path):
    write_lines(tmp_path / "train.jsonl", PAIRS)
    write_lines(tmp_path / "test.jsonl", [*PAIRS, *PAIRS])
    assert len(load_rows(str(tmp_path), Kind.PAIRED)) == 1
    assert len(load_rows(str(tmp_path), Kind.PAIRED, split="test")) == 2


def test_a_folder_that_datasets_names_its_own_way(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train-00000.jsonl", PAIRS)
    rows = load_rows(str(tmp_path), Kind.PAIRED, split="train[:1]")
    assert list(rows) == PAIRS


def test_a_saved_data_set_gives_its_splits(tmp_path):
    data = datasets.Dataset.from_list(PAIRS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": datasets.Dataset.from_list(PAIRS * 3)}).save_to_disk(tmp_path / "two")
    assert list(load_rows(str(tmp_path / "one"), Kind.PAIRED)) == PAIRS
    assert len(load_rows(str(tmp_path / "two"), Kind.PAIRED, split="test")) == 3
    with pytest.raises(UserError, match="has no split 'dev', only 'train', 'test'"):
        load_rows(str(tmp_path / "two"), Kind.PAIRED, split="dev")
    with pytest.raises(UserError, match="'train' only, not 'test'"):
        load_rows(str(tmp_path / "one"), Kind.PAIRED, split="test")


def test_a_configuration_that_nothing_reads_is_refused(tmp_path):
    write_lines(tmp_path / "pairs.jsonl", PAIRS)
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "one"))
    for name in ("arithmetic", str(tmp_path / "pairs.jsonl"), str(tmp_path / "one")):
        with pytest.raises(UserError, match=f"^--dataset_config main: {name} has no configurations; leave it out$"):
            load_rows(name, Kind.PAIRED, config="main")


@pytest.mark.parametrize("media", [{"images": ["a.png"]}, {"image": np.zeros((2, 2))}, {"audio": {"path": "a"}}])
def test_rows_of_text_with_pictures_are_refused_too(media):
    """The text speaks of what the model would not get."""
    rows = Rows("data", [{"prompt": "a", "completion": "b", "images": []}, {"prompt": "a", "completion": "b", **media}])
    message = f"^data, row 1 .counted from 0. has '{next(iter(media))}', but models are trained on text alone"
    with pytest.raises(UserError, match=message):
        prepare(rows, Kind.SEQUENCE, TOKENIZER)


@pytest.mark.parametrize(
    "name, split, message",
    [
        ("nowhere.jsonl", "train", "the data file nowhere.jsonl does not exist"),
        ("./nowhere", "train", "does not exist"),
        ("notes.txt", "train", "notes.txt is no data file of a known type: expected .jsonl"),
        ("pairs.jsonl", "test", "pairs.jsonl is a single file, which has the split 'train' only, not 'test'"),
        ("broken.jsonl", "train", "broken.jsonl, line 3, column 12 is not valid JSON"),
        ("broken.json", "train", "broken.json, line 2, column 11 is not valid JSON"),
        ("numbers.jsonl", "train", "numbers.jsonl, line 1 must be one object, .*, got int"),
        ("numbers.json", "train", r"numbers.json, row 0 .* must be one object, got int 3"),
        ("empty.jsonl", "train", "empty.jsonl has no rows"),
        ("latin.jsonl", "train", "latin.jsonl is not UTF-8 text .byte 0.: save it as UTF-8"),
        ("broken.parquet", "train", "broken.parquet cannot be read as parquet"),
        ("arithmetic", "dev", "'arithmetic' has no split 'dev', only 'train' and 'test'"),
        ("folder", "test", "the data set 'folder' .split 'test'. cannot be loaded: "),
    ],
)
def test_what_cannot_be_loaded_is_named(name, split, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "pairs.jsonl", PAIRS)
    write_lines(tmp_path / "notes.txt", ["hello"])
    write_lines(tmp_path / "broken.jsonl", [*PAIRS, "", '{"prompt": }'])
    write_lines(tmp_path / "broken.json", ["[", '{ "prompt"}]'])
    write_lines(tmp_path / "numbers.jsonl", ["3"])
    write_lines(tmp_path / "numbers.json", ["[3]"])
    write_lines(tmp_path / "empty.jsonl", ["", ""])
    write_lines(tmp_path / "broken.parquet", ["no"])
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "folder" / "train.jsonl", PAIRS)
    with pytest.raises(UserError, match=message):
        load_rows(name, Kind.PAIRED, split=split)


def test_an_unreachable_hub_name_says_what_was_expected(monkeypatch):
    def missing(name, config, split, streaming, revision):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name!r} doesn't exist on the Hub.\nTraceback")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(UserError, match="doesn't exist on the Hub; expected 'arithmetic', 'shopping', a file .*, a"):
        load_rows("nobody/nothing", Kind.PAIRED)


# --- examples


def test_a_pair_shares_its_prompt_and_ends_in_eos():
    (example,), report = prepared(PAIRS, Kind.PAIRED)
    assert example == Example([ord("a")], [Completion([ord("b"), EOS]), Completion([ord("c"), EOS])], row=0)
    assert str(report) == "data: 1 example"


def test_max_length_counts_the_prompt_and_one_completion():
    rows = [
        {"prompt": "1234", "chosen": "abc", "rejected": "d"},
        {"prompt": "12345", "chosen": "abc", "rejected": "abd"},
        {"prompt": "123456", "chosen": "abc", "rejected": "d"},
    ]
    examples, report = prepared(rows, Kind.PAIRED, max_length=6)
    assert [[bytes(c.ids) for c in x.completions if EOS not in c.ids] for x in examples] == [[b"ab"], [b"a", b"a"]]
    assert [x.row for x in examples] == [0, 1]
    # Row 0 loses c and EOS of chosen; row 1 b, c, EOS and b, d, EOS, after which the two are the same.
    assert (report.truncated, report.tokens_cut, report.dropped, report.identical) == (3, 8, 1, 1)
    assert str(report) == (
        "data: 2 examples; 1 dropped, without room for a completion within max_length; 3 completions truncated by 8 "
        "tokens in all; 1 pair with identical chosen and rejected"
    )


def test_no_max_length_keeps_everything():
    (example,), report = prepared([{"prompt": "a" * 3000, "completion": "b"}], Kind.SEQUENCE, max_length=None)
    assert len(example.prompt_ids) == 3000 and report.truncated == 0


def test_nothing_left_is_an_error():
    with pytest.raises(UserError, match="data: no example is left, .* max_length=2: raise max_length"):
        prepared([{"prompt": "abc", "completion": "d"}], Kind.SEQUENCE, max_length=2)
    with pytest.raises(UserError, match="no example is left"):
        prepare_prompts(Rows("data", [{"prompt": "abc"}]), TOKENIZER, max_length=3)


def test_an_empty_prompt_leaves_the_first_token_to_predict_from():
    (example,), _ = prepared([{"prompt": "", "completion": "bc"}], Kind.SEQUENCE)
    assert example == Example([ord("b")], [Completion([ord("c"), EOS])], row=0)
    (example,), _ = prepared([{"prompt": "", "chosen": "bc", "rejected": "bd"}], Kind.PAIRED)
    assert [example.prompt_ids, example.completions[1].ids] == [[ord("b")], [ord("d"), EOS]]
    with pytest.raises(UserError, match="row 0 .* has an empty prompt, and its completions differ"):
        prepared([{"prompt": "", "chosen": "b", "rejected": "c"}], Kind.PAIRED)


def test_pairs_for_a_labeled_method_become_desirable_and_then_undesirable_rows():
    examples, report = prepared(PAIRS * 2, Kind.LABELED)
    assert [(chr(x.completions[0].ids[0]), x.label, x.row) for x in examples] == [
        ("b", True, 0),
        ("b", True, 1),
        ("c", False, 0),
        ("c", False, 1),
    ]
    assert report.labels == (2, 2)


def test_tools_and_template_options_reach_the_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}{{ mood }}" + tokenizer.chat_template
    row = {
        "messages": [user("q"), assistant("a")],
        "tools": '[{"name": "f"}]',
        "chat_template_kwargs": {"mood": "calm"},
    }
    (example,), _ = prepare(Rows("data", [row]), Kind.SEQUENCE, tokenizer)
    text = tokenizer.decode(example.prompt_ids + example.completions[0].ids)
    assert text.startswith('[{"name": "f"}]calm<|im_start|>user')


def test_prompts_keep_what_rewards_need():
    rows = [
        {"prompt": [user("1+1")], "answer": "2", "level": 1},
        {"prompt": [user("x" * 99)], "answer": "?", "level": 2},
    ]
    (prompt,), report = prepare_prompts(Rows("data", rows), TOKENIZER, max_length=99)
    assert prompt.prompt == [user("1+1")] and prompt.columns == {"answer": "2", "level": 1} and prompt.row == 0
    assert TOKENIZER.decode(prompt.prompt_ids).endswith("<|im_start|>assistant\n")
    assert report.dropped == 1


@pytest.mark.parametrize("kind", Kind)
def test_arithmetic_serves_every_kind(kind):
    rows = load_rows("arithmetic", kind, split="test")
    if kind == Kind.GROUPED:
        assert prepare_prompts(rows, TOKENIZER)[1].examples == len(rows)
    else:
        assert prepare(rows, kind, TOKENIZER)[1].examples == len(rows)


# --- a third, gold completion

TRIPLE = {"prompt": "12", "chosen": "abc", "rejected": "d", "reference": "efghi"}


def test_a_gold_completion_comes_third():
    examples, report = prepared([TRIPLE, {**TRIPLE, "reference": "f"}], Kind.PAIRED, gold=True, max_length=5)
    assert [[bytes(i for i in c.ids if i != EOS) for c in e.completions] for e in examples] == [
        [b"abc", b"d", b"efg"],
        [b"abc", b"d", b"f"],
    ]
    assert (report.truncated, report.tokens_cut) == (3, 1 + 3 + 1)
    (example,), _ = prepared([TRIPLE], Kind.PAIRED)
    assert len(example.completions) == 2


def test_gold_shares_the_prompt_that_a_pair_begins_with():
    rows = [{"chosen": "a b", "rejected": "a c", "reference": "a d e"}]
    (example,), _ = prepared(rows, Kind.PAIRED, gold=True)
    assert [bytes(example.prompt_ids), *(bytes(c.ids[:-1]) for c in example.completions)] == [
        b"a",
        b" b",
        b" c",
        b" d e",
    ]
    chat = {name: [user("q"), assistant(name)] for name in ("chosen", "rejected", "reference")}
    (example,), _ = prepared([chat], Kind.PAIRED, gold=True)
    texts = [TOKENIZER.decode(c.ids) for c in example.completions]
    assert [name in text for name, text in zip(chat, texts, strict=True)] == [True] * 3
    assert not any("q" in text for text in texts)
    with pytest.raises(UserError, match=r"row 0 .*: 'reference' does not begin with the prompt that 'chosen' and"):
        prepared([{**rows[0], "reference": "b d"}], Kind.PAIRED, gold=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reference": None}, "lacks 'reference', which the first row has: fill it in or remove the row"),
        ({"reference": " "}, "'reference' has no text to learn from: fill it in or remove the row"),
    ],
)
def test_a_missing_gold_completion_is_named(change, message):
    with pytest.raises(UserError, match=f"row 1 .*{message}"):
        prepared([TRIPLE, {**TRIPLE, **change}], Kind.PAIRED, gold=True)
    with pytest.raises(UserError, match=r"data, row 0 .* has no 'reference', .*: add the column, or use a method"):
        prepared([*PAIRS, TRIPLE], Kind.PAIRED, gold=True)


# --- bad rows

GOOD = {
    Kind.SEQUENCE: {"prompt": "a", "completion": "b"},
    Kind.PAIRED: PAIRS[0],
    Kind.LABELED: {"prompt": "a", "completion": "b", "label": True},
    Kind.GROUPED: {"prompt": "a"},
}
GOOD_CHAT = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
SECOND = r"data, row 1 \(counted from 0\)"
BAD = [
    (Kind.SEQUENCE, {"prompt": "a"}, f"{SECOND} lacks 'completion', which the first row has"),
    (Kind.SEQUENCE, {"prompt": "a", "completion": None}, f"{SECOND} lacks 'completion'"),
    (Kind.SEQUENCE, {"prompt": "a", "completion": " \n"}, f"{SECOND}: 'completion' has no text to learn from"),
    (Kind.PAIRED, {"prompt": "a", "chosen": "b", "rejected": ""}, f"{SECOND}: 'rejected' has no text"),
    (Kind.PAIRED, {"prompt": "a", "chosen": 3, "rejected": "c"}, f"{SECOND}: 'chosen' must be text .*, got int 3"),
    (Kind.PAIRED, GOOD_CHAT, f"{SECOND}: 'prompt' must be text or a list of messages, and the same in all rows"),
    (
        Kind.LABELED,
        {"prompt": "a", "completion": "b", "label": 1},
        f"{SECOND}: 'label' must be true or false, got int 1",
    ),
    (Kind.LABELED, {"prompt": "a", "completion": "b", "label": None}, f"{SECOND} lacks 'label'"),
    (Kind.GROUPED, {"prompt": ""}, f"{SECOND}: the prompt has no tokens"),
    (Kind.GROUPED, {"prompt": "a", "answer": 1}, f"{SECOND} has the columns prompt, answer, the first row prompt: "),
]


@pytest.mark.parametrize("kind, row, message", BAD)
def test_a_bad_row_is_named_with_its_column(kind, row, message):
    rows = Rows("data", [GOOD[kind], row])
    with pytest.raises(UserError, match=message):
        prepare_prompts(rows, TOKENIZER) if kind == Kind.GROUPED else prepare(rows, kind, TOKENIZER)


BAD_CHATS = [
    ({"prompt": "a"}, f"{SECOND}: 'prompt' must be a list of messages, as in the first row, got str 'a'"),
    ({"prompt": []}, f"{SECOND}: the prompt must be a list of at least one message"),
    ({"prompt": [{"role": "gpt", "content": "s"}]}, f"{SECOND}: the prompt, message 0 has the role 'gpt': write"),
    ({"chosen": [user("b")]}, f"{SECOND}: 'chosen' has no assistant's turn to learn from"),
    ({"chosen": [assistant(" ")]}, f"{SECOND}: 'chosen', message 0 is an assistant's turn without text"),
    (
        {"chosen": [{"role": "assistant"}]},
        f"{SECOND}: 'chosen', message 0 must have text as its 'content', got NoneType",
    ),
    ({"chosen": [{"from": "gpt"}]}, f"{SECOND}: 'chosen', message 0 must be an object with 'role' and 'content'"),
]


@pytest.mark.parametrize("change, message", BAD_CHATS)
def test_a_bad_conversation_is_named_with_its_message(change, message):
    with pytest.raises(UserError, match=message):
        prepared([GOOD_CHAT, {**GOOD_CHAT, **change}], Kind.PAIRED)


def test_a_bad_row_of_a_file_is_named_by_its_line(tmp_path):
    path = write_lines(tmp_path / "pairs.jsonl", [*PAIRS, "", {"prompt": "a", "chosen": "b"}])
    with pytest.raises(UserError, match="pairs.jsonl, line 3 lacks 'rejected'"):
        prepare(load_rows(path, Kind.PAIRED), Kind.PAIRED, TOKENIZER)


def test_missing_columns_are_said_with_those_there_are():
    message = "has the columns question, answer, expected prompt and completion, or messages, or conversations, or text"
    with pytest.raises(UserError, match=message):
        prepared([{"question": "a", "answer": "b"}], Kind.SEQUENCE)


def test_a_conversation_without_an_answer_teaches_nothing():
    with pytest.raises(UserError, match="'messages' has no assistant's turn"):
        prepared([{"messages": [user("a")]}], Kind.SEQUENCE)


def test_what_the_tokenizer_lacks_is_said():
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="conversations, but the tokenizer has no chat template"):
        prepare(Rows("data", [GOOD_CHAT]), Kind.PAIRED, bare)
    bare.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        prepare(Rows("data", PAIRS), Kind.PAIRED, bare)
    unmarked = tiny_tokenizer()
    unmarked.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = Rows("data", [{"messages": [user("a"), assistant("b")]}])
    with pytest.raises(UserError, match="assistant_only_loss needs a chat template that marks"):
        prepare(rows, Kind.SEQUENCE, unmarked, assistant_only_loss=True)


def test_options_that_do_not_fit_the_data_are_refused():
    with pytest.raises(UserError, match="completion_only_loss needs the columns prompt and completion"):
        prepared([{"text": "abc"}], Kind.SEQUENCE, completion_only_loss=True)
    with pytest.raises(UserError, match="assistant_only_loss needs conversations"):
        prepared([{"text": "abc"}], Kind.SEQUENCE, assistant_only_loss=True)
