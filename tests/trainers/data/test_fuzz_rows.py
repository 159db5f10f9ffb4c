"""Whatever rows hold, reading them ends in examples or in one sentence: odd ones for every kind of loss."""

import json
import random

import pytest

from logratio.losses import Kind
from logratio.trainers.data.examples import Rows, load_rows, prepare, prepare_prompts
from logratio.trainers.errors import UserError
from logratio.trainers.policy.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token
COLUMNS = ["prompt", "completion", "chosen", "rejected", "messages", "conversations", "text", "reference", "label"]
EXTRAS = ["weight", "tools", "chat_template_kwargs", "system", "answer", "completions", "images", "", "\ud800"]
ROLES = ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "", "\udc00", None, 3]
TEXTS = [
    "",
    " ",
    "\n",
    "a",
    "a b",
    "[",
    "[]",
    "{}",
    "null",
    "\x00",
    "\ufeff",
    "\u2028",
    "é",
    "e\u0301",
    "😀",
    "\ud83d",
    "\ude00x",
]
TEXTS += [
    EOS,
    f"{EOS}{EOS}",
    "<|im_start|>",
    "<|im_end|>",
    "{{ messages }}",
    "{% generation %}",
    "[1, 2]",
    "\u202e",
    "9" * 5000,
]
TEXTS += [
    '[{"role": "user", "content": "q"}]',
    "[{'role': 'user', 'content': 'q'}]",
    '{"name": "f", "arguments": {}}',
    "[" * 200,
]
TEXTS += [
    '[{"role": "user", "content": "\\ud83d"}]',
    '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]',
]
NUMBERS = [0, 1, -1, 0.5, 1e308, -0.0, float("nan"), float("inf"), 2**63, 10**5000, -(10**5000), True, False, None]


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


def any_value(rng, depth=0):
    """A JSON value, or what Python can have in its place."""
    choice = rng.random()
    if choice < 0.35:
        return rng.choice(TEXTS)
    if choice < 0.6 or depth > 3:
        return rng.choice(NUMBERS)
    if choice < 0.63:
        return rng.choice([nested(70), nested(901), nested(5000), b"bytes", "a" * 50_000])
    count = rng.randrange(4)
    if choice < 0.8:
        return [any_value(rng, depth + 1) for _ in range(count)]
    return {rng.choice([*ROLES[:5], *EXTRAS, 7]): any_value(rng, depth + 1) for _ in range(count)}


def message(rng):
    role, content = rng.choice([("role", "content"), ("role", "content"), ("from", "value")])
    made = {role: rng.choice(ROLES), content: rng.choice([*TEXTS, *NUMBERS, [], [{"type": "text", "text": "a"}]])}
    if rng.random() < 0.2:
        call = {"type": "function", "function": {"name": "f", "arguments": rng.choice([{}, "{}", "{", None, {"a": 1}])}}
        made["tool_calls"] = rng.choice([[call], [], [call, call], call, "f", [None], [{}]])
    if rng.random() < 0.2:
        made[rng.choice(["weight", "name", "tool_call_id", "content", "\ud800"])] = any_value(rng, 2)
    return made


def conversation(rng):
    """Mostly messages in a good order, so that what follows the checks is reached as well."""
    if rng.random() < 0.5:
        turns = [{"role": rng.choice(["user", "system"]), "content": "q"}] * rng.randrange(2)
        turns = turns + [{"role": "user", "content": "q"}, {"role": "assistant", "content": rng.choice(TEXTS)}]
        return turns[: rng.randrange(len(turns) + 1)]
    return [message(rng) if rng.random() < 0.9 else any_value(rng) for _ in range(rng.randrange(5))]


def cell(rng, column):
    choice = rng.random()
    if choice < 0.15:
        return any_value(rng)
    if column == "label":
        return rng.choice([True, False, 1, "True", None])
    if column in ("weight", "system", "answer", ""):
        return rng.choice([*NUMBERS, *TEXTS])
    if column == "tools":
        tool = {"type": "function", "function": {"name": "f", "parameters": rng.choice([{}, None, nested(30)])}}
        return rng.choice([[tool], json.dumps([tool]), [], "", "null", "{", [None], [1], [nested(100)], tool])
    if column == "chat_template_kwargs":
        name = rng.choice(
            ["enable_thinking", "tokenize", "messages", "bos_token", "documents", "self", "", "a b", "tools"]
        )
        return rng.choice([{name: any_value(rng)}, json.dumps({name: 1}), [name], name, None])
    if choice < 0.55:
        return rng.choice(TEXTS)
    made = conversation(rng)
    if choice < 0.6:
        return json.dumps(made, default=str) if is_json(made) else made
    return made[0] if choice < 0.62 and made else made


def is_json(value):
    try:
        return bool(json.dumps(value, default=str))
    except (ValueError, TypeError, RecursionError):
        return False


def odd_row(rng):
    names = rng.sample(COLUMNS, rng.randrange(1, len(COLUMNS)))
    names += [name for name in EXTRAS if rng.random() < 0.08]
    return {name: cell(rng, name) for name in names}


TEXT = {"prompt": "q", "completion": "a", "chosen": "a", "rejected": "b", "reference": "c", "text": "q", "label": True}
ANSWERS = {name: [{"role": "assistant", "content": name}] for name in ("completion", "chosen", "rejected", "reference")}
CHAT = {"prompt": [{"role": "user", "content": "q"}], **ANSWERS, "label": False}
WHOLE = {name: [*CHAT["prompt"], *turns] for name, turns in ANSWERS.items()} | {
    "messages": CHAT["prompt"] + ANSWERS["chosen"]
}
TEXT |= {"completions": ["a", "b", "c"], "rewards": [1.0, 0.5, 0.0]}
CHAT |= {"completions": [ANSWERS["chosen"], ANSWERS["rejected"]], "rewards": [1.0, 0.0]}
GOOD = {
    Kind.SEQUENCE: [(TEXT, "text"), (WHOLE, "messages"), (TEXT, "prompt completion"), (CHAT, "prompt completion")],
    Kind.PAIRED: [
        (TEXT, "prompt chosen rejected reference"),
        (CHAT, "prompt chosen rejected reference"),
        (WHOLE, "chosen rejected reference"),
    ],
    Kind.LABELED: [
        (TEXT, "prompt completion label"),
        (CHAT, "prompt completion label"),
        (CHAT, "prompt chosen rejected"),
    ],
    Kind.GROUPED: [(TEXT, "prompt"), (CHAT, "prompt")],
    Kind.LISTED: [(TEXT, "prompt completions rewards"), (CHAT, "prompt completions rewards")],
}


def data_sets(seed, rows):
    """Data sets for a kind: mostly a good row and others like it with an odd cell or two, some with odd rows only."""
    rng = random.Random(seed)
    while rows > 0:
        kind = rng.choice(list(Kind))
        source, columns = rng.choice(GOOD[kind])
        columns = columns.split()
        good = {name: source[name] for name in columns}
        made = [odd_row(rng) if rng.random() < 0.1 else dict(good) for _ in range(rng.randrange(1, 12))]
        for row in made:
            for name in rng.sample([*columns, *columns, *EXTRAS], rng.randrange(3)):
                row[name] = cell(rng, name)
        rows -= len(made)
        yield rng, kind, [good, *made] if rng.random() < 0.9 else made


def read(rows, kind, rng, on_bad_row):
    options = {"max_length": rng.choice([2, 32, 1024, 1024, None]), "on_bad_row": on_bad_row}
    if kind == Kind.GROUPED:
        return prepare_prompts(rows, TOKENIZER, **options)
    if kind == Kind.SEQUENCE:
        options["completion_only_loss"] = rng.choice([None, None, None, True, False])
        options["assistant_only_loss"] = rng.random() < 0.1
    return prepare(rows, kind, TOKENIZER, gold=kind == Kind.PAIRED and rng.random() < 0.3, **options)


def check(seed, rows):
    used = refused = 0
    for rng, kind, made in data_sets(seed, rows):
        for on_bad_row in ("error", "skip"):
            try:
                examples, report = read(Rows("data", made), kind, rng, on_bad_row)
            except UserError as error:
                assert "\n" not in str(error), error
                refused += 1
                continue
            bad = {entry["row"] for entry in report.skipped}
            assert not bad & {example.row for example in examples}
            assert len({example.row for example in examples} | bad) + report.dropped >= len(made)
            assert str(report) and json.dumps(report.skipped)
            used += 1
    assert min(used, refused) > (used + refused) / 5, (used, refused)


def test_odd_rows_are_examples_or_one_sentence():
    check(seed=0, rows=1000)


@pytest.mark.slow
def test_twenty_thousand_odd_rows_are_examples_or_one_sentence():
    check(seed=1, rows=20_000)


def odd_line(rng):
    choice = rng.random()
    row = odd_row(rng)
    text = json.dumps(row, default=str) if is_json(row) else "[" * 100_000
    if choice < 0.3:
        at = rng.randrange(len(text))
        return (
            text[:at]
            + rng.choice(["", "\x00", '"', "}", "\ufeff", "\r", "9" * 5000, "{" * 2000])
            + text[at + rng.randrange(3) :]
        )
    return rng.choice([text, text[: rng.randrange(len(text))], '{"text": "a", "text": "b"}', "9" * 5000, ""])


def test_odd_lines_of_a_file_are_rows_or_one_sentence(tmp_path):
    rng = random.Random(2)
    for index in range(60):
        path = tmp_path / f"{index}.{rng.choice(['jsonl', 'json'])}"
        data = "\n".join(odd_line(rng) for _ in range(rng.randrange(6))).encode("utf-8", "surrogatepass")
        path.write_bytes(data if rng.random() < 0.8 else data[: rng.randrange(len(data) + 1)] + b"\xff")
        for kind in Kind:
            for skip in (False, True):
                try:
                    rows = load_rows(str(path), kind, check=not skip)
                    read(rows, kind, rng, "skip" if skip else "error")
                except UserError as error:
                    assert "\n" not in str(error) and str(path) in str(error)
