"""Which rows are held out, trained on and shown first, and what they become for each kind of loss."""

import dataclasses
import json

from logratio.benchmarks.comparing.rows import Material, as_kind, material
from logratio.losses import Kind
from logratio.trainers.data.tasks.shopping import lists, shopping_rows

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b", "reference": "c", "margin": 2.0, "answer": "a"}


def test_what_is_held_out_by_lot_is_not_trained_on(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"{i}=", "chosen": f"a{i}", "rejected": "b"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, again = (material(str(path), "train", None, 6) for _ in range(2))
    assert len(data.held_out) == 6 and data == again
    said = sorted([*data.train, *data.held_out], key=lambda row: int(row["prompt"][:-1]))
    assert said == rows and data.held_out != rows[:6]
    shown = [(row["prompt"], row["completion"]) for row in data.demonstrations]
    assert shown == [(row["prompt"], row["chosen"]) for row in data.train]


def test_an_embedded_task_has_a_split_for_it_and_demonstrations():
    data = material("shopping", "train", None, 7)
    assert [row["prompt"] for row in data.held_out] == [f"{things}=" for things in lists("test")[:7]]
    assert [row["prompt"] for row in data.train] == [f"{things}=" for things in lists()]
    assert data.demonstrations == shopping_rows(Kind.SEQUENCE), "not what was chosen"


def test_a_pair_in_every_kind():
    more = {"prompt": "q", "answer": "a"}
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "reference": "c", "answer": "a"}
    assert as_kind([PAIR], Kind.PAIRED) == [pair] and as_kind([PAIR], Kind.PAIRED, margin=True) == [PAIR]
    assert as_kind([PAIR], Kind.SEQUENCE) == [{**more, "completion": "a"}]
    assert as_kind([PAIR], Kind.LISTED) == [{**more, "completions": ["a", "b"], "rewards": [1, 0]}]
    both = [{**more, "completion": "a", "label": True}, {**more, "completion": "b", "label": False}]
    assert as_kind([PAIR], Kind.LABELED) == both and as_kind([PAIR], Kind.GROUPED) == [more]


def test_another_row_anywhere_is_another_comparison():
    one = Material([PAIR], [PAIR], [PAIR])
    others = [dataclasses.replace(one, **{f.name: [{**PAIR, "chosen": "x"}]}) for f in dataclasses.fields(one)]
    assert len({data.digest() for data in (one, *others)}) == 4 and one.digest() == Material(*[[PAIR]] * 3).digest()
