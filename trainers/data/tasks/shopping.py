"""The embedded data set `shopping`: where to buy four things, which many answers do rightly and few do well.

Each of the goods 0 to 9 is sold by three of the shops a to e (`PRICES`). A right answer to the list "7294=" names, for
each of its goods in turn, a shop that sells it; "ccee" is the cheapest, for 1 + 3 + 2 + 1. There are 10,000 lists, of
which the test split is fixed, whatever the seed.

What is imitated is not what is preferred. The demonstrations (`bought`) are those of people who go where they always
go, mostly where it is dear; one in ten names a shop that does not sell the thing. Two of them for the same list make a
pair, judged by the bill alone (`worth`), never wrongly: the chosen answer is only the better one of two bad ones. To
imitate the chosen answers is to end where the better of two such buyers does; to compare them is to learn the prices.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from logratio.losses import Kind

from ...errors import UserError

SPLITS = ("train", "test")
PRICES = {
    "0": {"a": 2, "b": 5, "c": 9},
    "1": {"b": 1, "c": 4, "d": 7},
    "2": {"c": 3, "d": 6, "e": 8},
    "3": {"d": 2, "e": 5, "a": 9},
    "4": {"e": 1, "a": 4, "b": 7},
    "5": {"a": 3, "c": 6, "d": 8},
    "6": {"b": 2, "d": 5, "e": 9},
    "7": {"c": 1, "e": 4, "a": 7},
    "8": {"d": 3, "a": 6, "b": 8},
    "9": {"e": 2, "b": 5, "c": 9},
}
"""Of each thing: shop -> price. Each shop is the cheapest for two, and the dearest for two others."""
HABIT = (1, 2, 3)
"""How often a buyer goes to the cheapest shop, the second and the dearest."""
MISTAKES = 0.1  # of the demonstrations
LENGTH = 4  # things on a list
TEST_LISTS, TRAIN_LISTS = 1000, 3000
_SPLIT_SEED = 20261127


def lists(split: str = "train") -> list[str]:
    """The lists of one split in a fixed shuffled order."""
    if split not in SPLITS:
        raise UserError(f"the data set 'shopping' has no split {split!r}, only {' and '.join(map(repr, SPLITS))}")
    every = [f"{number:0{LENGTH}}" for number in range(10**LENGTH)]
    random.Random(_SPLIT_SEED).shuffle(every)
    return every[:TEST_LISTS] if split == "test" else every[TEST_LISTS:][:TRAIN_LISTS]


def cheapest(things: str) -> str:
    """The shops of the smallest bill."""
    return "".join(min(PRICES[thing], key=PRICES[thing].__getitem__) for thing in things)


def bought(things: str, rng: random.Random) -> str:
    """What somebody does: by `HABIT`, and now and then (`MISTAKES`) with one shop that has not got the thing."""
    shops = [rng.choices(sorted(PRICES[thing], key=PRICES[thing].__getitem__), HABIT)[0] for thing in things]
    if rng.random() < MISTAKES:
        at = rng.randrange(len(things))
        shops[at] = rng.choice([shop for shop in "abcde" if shop not in PRICES[things[at]]])
    return "".join(shops)


def worth(things: str, shops: str) -> float:
    """0 where a shop does not sell the thing or the answer is not of the list's length; else the smallest bill by this
    one, 1 for the cheapest."""
    if len(shops) != len(things) or any(s not in PRICES[thing] for thing, s in zip(things, shops, strict=True)):
        return 0.0
    bill, least = (sum(PRICES[t][s] for t, s in zip(things, x, strict=True)) for x in (shops, cheapest(things)))
    return least / bill


def cheap_basket(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float | None]:
    """The reward of the task: what each completion is `worth`."""
    return [worth(p.rstrip("="), text) for p, text in zip(prompts, completions, strict=True)]


def shopping_rows(kind: Kind, split: str = "train", seed: int = 0) -> list[dict[str, Any]]:
    """Rows of one split in the columns that `kind` needs; `seed` draws the demonstrations.

    Sequences: prompt, completion (a demonstration). Pairs: prompt, chosen and rejected (two demonstrations of
    different worth), answer (the cheapest), reference (the same, for losses with a gold completion). Labeled: both of a
    pair, in two rows. Grouped: prompt, answer.
    """
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for things in lists(split):
        prompt, best = f"{things}=", cheapest(things)
        if kind == Kind.GROUPED:
            rows.append({"prompt": prompt, "answer": best})
        elif kind == Kind.SEQUENCE:
            rows.append({"prompt": prompt, "completion": bought(things, rng)})
        else:
            chosen, rejected = judged(things, rng)
            if kind == Kind.PAIRED:
                rows.append(
                    {"prompt": prompt, "chosen": chosen, "rejected": rejected, "answer": best, "reference": best}
                )
            else:
                rows.append({"prompt": prompt, "completion": chosen, "label": True})
                rows.append({"prompt": prompt, "completion": rejected, "label": False})
    return rows


def judged(things: str, rng: random.Random) -> tuple[str, str]:
    """Two demonstrations of different worth, the better one first."""
    while True:
        one, other = sorted((bought(things, rng), bought(things, rng)), key=lambda shops: -worth(things, shops))
        if worth(things, one) != worth(things, other):
            return one, other
