"""The task whose demonstrations are not what is preferred: what is right, what is cheap, and how far apart they are."""

import random
from statistics import mean

import pytest

from logratio.losses import Kind
from logratio.trainers.data.rows import load_rows
from logratio.trainers.data.tasks.shopping import (
    PRICES,
    bought,
    cheap_basket,
    cheapest,
    judged,
    lists,
    shopping_rows,
    worth,
)
from logratio.trainers.errors import UserError


def test_worth_by_hand():
    """7 at c for 1, 2 at c for 3, 9 at e for 2, 4 at e for 1: 7 in all."""
    assert cheapest("7294") == "ccee" and worth("7294", "ccee") == 1
    assert worth("7294", "aecb") == pytest.approx(7 / (7 + 8 + 9 + 7))
    assert worth("7294", "bcee") == 0, "no 7 at b"
    assert [worth("7294", text) for text in ("", "cce", "cceee", "ccez", " ccee")] == [0, 0, 0, 0, 0]
    assert cheap_basket(["7294=", "00="], ["ccee", "ab"]) == [1.0, pytest.approx(4 / 7)]


def test_no_shop_is_the_best_in_general():
    assert all(len(shops) == 3 for shops in PRICES.values()) and len(PRICES) == 10
    first = [min(shops, key=shops.get) for shops in PRICES.values()]
    last = [max(shops, key=shops.get) for shops in PRICES.values()]
    assert {shop: (first.count(shop), last.count(shop)) for shop in "abcde"} == dict.fromkeys("abcde", (2, 2))


def test_the_splits_share_no_list():
    assert len(lists("test")) == 1000 and len(lists()) == 3000 and not set(lists()) & set(lists("test"))
    with pytest.raises(UserError, match="the data set 'shopping' has no split 'dev', only 'train' and 'test'"):
        lists("dev")


def test_a_pair_is_two_demonstrations_of_which_the_cheaper_is_chosen():
    for row in shopping_rows(Kind.PAIRED)[:300]:
        things = row["prompt"].rstrip("=")
        assert worth(things, row["chosen"]) > worth(things, row["rejected"])
        assert row["answer"] == row["reference"] == cheapest(things)


def test_what_is_chosen_is_seldom_what_is_best():
    """Nine of ten demonstrations are possible, and dear; of two the better one is not much better."""
    rng = random.Random(0)
    said = [worth(things, bought(things, rng)) for things in lists()]
    chosen = [worth(things, judged(things, rng)[0]) for things in lists()]
    assert 0.88 < mean(value > 0 for value in said) < 0.92 and mean(said) < 0.35
    assert mean(chosen) < 0.42 and mean(value == 1 for value in chosen) < 0.01


def test_every_kind_has_its_columns_by_the_name_of_the_data_set():
    columns = {
        Kind.SEQUENCE: {"prompt", "completion"},
        Kind.PAIRED: {"prompt", "chosen", "rejected", "answer", "reference"},
        Kind.LABELED: {"prompt", "completion", "label"},
        Kind.GROUPED: {"prompt", "answer"},
    }
    for kind, names in columns.items():
        rows = load_rows("shopping", kind)
        assert set(next(iter(rows))) == names and len(rows) == 3000 * (2 if kind is Kind.LABELED else 1)
    assert shopping_rows(Kind.PAIRED, seed=1) != shopping_rows(Kind.PAIRED) == shopping_rows(Kind.PAIRED, seed=0)
