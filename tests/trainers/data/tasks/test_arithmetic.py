"""The embedded task: right answers are right, wrong ones wrong, and the test split was not seen."""

import pytest

from logratio.losses import Kind
from logratio.trainers.data.tasks.arithmetic import arithmetic_rows, questions
from logratio.trainers.errors import UserError


def total(prompt: str) -> int:
    left, right = prompt.removesuffix("=").split("+")
    return int(left) + int(right)


def test_the_splits_are_all_questions_and_share_none_even_mirrored():
    train, test = questions("train"), questions("test")
    assert sorted(train + test) == [(a, b) for a in range(10, 100) for b in range(10, 100)]
    assert len(test) >= 1000
    assert not {frozenset(q) for q in train} & {frozenset(q) for q in test}


def test_the_order_is_shuffled():
    train = questions("train")
    assert train != sorted(train)
    assert any(a < 20 for a, _ in train[:50]) and any(a > 90 for a, _ in train[:50])


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right_and_rejected_ones_wrong(split):
    for row in arithmetic_rows(Kind.SEQUENCE, split):
        assert int(row["completion"]) == total(row["prompt"])
    for row in arithmetic_rows(Kind.GROUPED, split):
        assert int(row["answer"]) == total(row["prompt"])
    for row in arithmetic_rows(Kind.PAIRED, split):
        assert int(row["chosen"]) == total(row["prompt"])
        assert abs(int(row["rejected"]) - total(row["prompt"])) in (1, 10)
    labels = [row["label"] for row in arithmetic_rows(Kind.LABELED, split)]
    assert sum(labels) * 2 == len(labels)
    for row in arithmetic_rows(Kind.LABELED, split):
        assert (int(row["completion"]) == total(row["prompt"])) == row["label"]


def test_the_seed_draws_wrong_answers_and_never_moves_a_question():
    one, same, other = (arithmetic_rows(Kind.PAIRED, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    assert [row["prompt"] for row in one] == [row["prompt"] for row in other]


def test_an_unknown_split_is_named():
    with pytest.raises(UserError, match="no split 'validation', only 'train' and 'test'"):
        questions("validation")
