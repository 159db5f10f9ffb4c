"""The tables of the suite `learning`: what was learned, and at what cost, with one seed after the other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from logratio.trainers.data.tasks.arithmetic import TEST_SUMS
from logratio.trainers.rollout.intervals import wilson

from .rows import OURS, Row
from .tables import beside_ours, matrix, number, titled

STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""number of seeds -> how many standard errors of their mean hold 95 %, of Student's distribution."""


def learning_tables(rows: Sequence[Row], absolute: bool) -> list[str]:
    """A line for each seed, and one of them all."""
    keys = {"seed": "seed", "questions of a step": "prompts", "completions each": "group", "steps": "steps"}

    def right(row: Row, base: Row | None) -> str:
        low, high = row["between"]
        return f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})"

    cost = beside_ours("cpu_s", (lambda row: f"{number(row.get('cpu_s'))} s") if absolute else None)
    each = [row | {"between": of_questions(row)} if row["status"] == "ok" else row for row in rows]
    before = "; ".join(
        f"seed {row['seed']}: {row['accuracy_before']:.1%}"
        for row in rows
        if row["contestant"] == OURS and row["status"] == "ok"
    )
    return titled(
        rows,
        {
            "Right answers to test questions, and where 95 % of what other questions would give lies; of all, of what "
            f"other seeds would (before: {before})": matrix([*each, *of_all_seeds(rows)], keys, right),
            "CPU time of training, as multiple of ours": matrix(rows, keys, cost, base="(1×)"),
        },
    )


def of_questions(row: Row) -> tuple[float, float]:
    """Wilson's interval, of as many independent questions as would have the measured standard error; where that is 0,
    of one of each two that mirror each other."""
    share, error = row["accuracy"], row["accuracy_se"]
    return wilson(share, share * (1 - share) / error**2 if error else TEST_SUMS)


def of_all_seeds(rows: Sequence[Row]) -> list[Row]:
    """A row for each contestant that several seeds were measured of: the mean, by Student's distribution."""
    found = []
    for name in dict.fromkeys(row["contestant"] for row in rows):
        own = [row for row in rows if row["contestant"] == name and row["status"] == "ok"]
        if len(own) not in STUDENT:
            continue
        accuracies = [row["accuracy"] for row in own]
        half = STUDENT[len(own)] * statistics.stdev(accuracies) / math.sqrt(len(own))
        middle = statistics.mean(accuracies)
        mean = {"accuracy": middle, "between": (max(0.0, middle - half), min(1.0, middle + half))}
        found.append(own[0] | {"case": "all", "seed": "all"} | mean)
    return found
