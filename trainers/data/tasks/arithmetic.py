"""The embedded data set `arithmetic`: two-digit additions, whose answers can be checked.

Its 8,100 questions are every a+b with a and b from 10 to 99. The test split is fixed, whatever the seed:
a question and its mirror image (b+a) are always in the same split, so no test question was seen in training.
"""

from __future__ import annotations

import random
from typing import Any

from logratio.losses import Kind

from ...errors import UserError

SPLITS = ("train", "test")
TEST_SUMS = 600  # unordered pairs {a, b} held out, nearly two questions each
_SPLIT_SEED = 20260101
MISTAKES = (-10, -1, 1, 10)
"""That somebody could make: one off, or a carry too many or too few."""


def questions(split: str = "train") -> list[tuple[int, int]]:
    """The (a, b) of one split in a fixed shuffled order."""
    if split not in SPLITS:
        raise UserError(f"the data set 'arithmetic' has no split {split!r}, only {' and '.join(map(repr, SPLITS))}")
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng = random.Random(_SPLIT_SEED)
    rng.shuffle(pairs)
    pairs = pairs[:TEST_SUMS] if split == "test" else pairs[TEST_SUMS:]
    ordered = [question for a, b in pairs for question in dict.fromkeys([(a, b), (b, a)])]
    rng.shuffle(ordered)
    return ordered


def arithmetic_rows(kind: Kind, split: str = "train", seed: int = 0) -> list[dict[str, Any]]:
    """Rows of one split in the columns that `kind` needs; `seed` draws the wrong answers.

    Sequences: prompt, completion. Pairs: prompt, chosen (the sum), rejected (a wrong one), reference (the sum again,
    for losses with a gold completion). Labeled: prompt, completion, label; a right and a wrong row for each question.
    Listed: prompt, completions (the sum and two wrong ones), rewards (1 less a tenth of the error).
    Grouped: prompt, answer.
    """
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for a, b in questions(split):
        prompt, right, wrong = f"{a}+{b}=", str(a + b), str(a + b + rng.choice(MISTAKES))
        if kind == Kind.SEQUENCE:
            rows.append({"prompt": prompt, "completion": right})
        elif kind == Kind.PAIRED:
            rows.append({"prompt": prompt, "chosen": right, "rejected": wrong, "reference": right})
        elif kind == Kind.LABELED:
            rows.append({"prompt": prompt, "completion": right, "label": True})
            rows.append({"prompt": prompt, "completion": wrong, "label": False})
        elif kind == Kind.LISTED:
            errors = [0, *rng.sample(MISTAKES, 2)]
            rewards = [1 - abs(error) / 10 for error in errors]
            rows.append({"prompt": prompt, "completions": [str(a + b + x) for x in errors], "rewards": rewards})
        else:
            rows.append({"prompt": prompt, "answer": right})
    return rows
