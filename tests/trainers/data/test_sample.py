"""What a screen shows of an example: its texts, by what they are."""

import pytest

from logratio.trainers.data.sample import sample
from logratio.trainers.data.types import Completion, Example
from logratio.trainers.policy.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def example(*texts, **more):
    ids = [TOKENIZER.encode(text, add_special_tokens=False) for text in ("1+1=", *texts)]
    ids[1] = [*ids[1], TOKENIZER.eos_token_id]
    return Example(ids[0], [Completion(one) for one in ids[1:]], row=7, **more)


@pytest.mark.parametrize(
    "made, told",
    [
        (example("2"), [("completion", "2")]),
        (example("2", label=True), [("desirable", "2")]),
        (example("3", label=False), [("undesirable", "3")]),
        (example("2", "3"), [("chosen", "2"), ("rejected", "3")]),
        (example("2", "3", "two"), [("chosen", "2"), ("rejected", "3"), ("gold", "two")]),
        (example("2", "3", advantages=(0.75, -1 / 3)), [("advantage -0.333", "3")]),
    ],
)
def test_it_is_read_by_what_it_is(made, told):
    assert sample(made, TOKENIZER, 5) == [("row 7", "1+1="), *told]


def test_rollouts_take_turns():
    made = example("a", "b", "c", advantages=(1.0, 2.0, 3.0))
    assert [sample(made, TOKENIZER, turn)[1][1] for turn in range(4)] == ["a", "b", "c", "a"]
