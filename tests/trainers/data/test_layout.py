"""Columns that will not do: the near name, or the method that they are for."""

import pytest

from logratio.losses import Kind
from logratio.trainers.data.layout import remedy_of

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("kind", "row", "hint"),
    [
        (Kind.PAIRED, {"messages": TURNS}, "; these are sft's columns: logratio train sft"),
        (Kind.PAIRED, {"text": "a", "id": 3}, "; these are sft's columns: logratio train sft"),
        (
            Kind.SEQUENCE,
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "; these are dpo's columns: logratio train dpo",
        ),
        (
            Kind.PAIRED,
            {"prompt": "a", "completion": "b", "label": True},
            "; these are kto's columns: logratio train kto",
        ),
        (Kind.PAIRED, {"prompt": "a"}, "; these are grpo's columns: logratio train grpo"),
        (
            Kind.PAIRED,
            {"prompt": "a", "chosenn": "b", "rejected": "c"},
            "; is 'chosenn' meant to be 'chosen'? then rename it",
        ),
        (Kind.SEQUENCE, {"message": TURNS}, "; is 'message' meant to be 'messages'? then rename it"),
        (Kind.PAIRED, {"question": "a", "answer": "b"}, ""),
        (Kind.PAIRED, {}, ""),
        (Kind.PAIRED, {"prompt": None, "chosen": None}, ""),
    ],
)
def test_what_to_do_about_columns(kind, row, hint):
    assert remedy_of(row, kind) == hint
