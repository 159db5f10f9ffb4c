"""From the lines of all runs to what is said of them: means, differences, and in words which is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .intervals import Bootstrap, Comparison, Estimate, Values, compared
from .scores import METRICS

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """names: the contestants that all seeds ended well of, in the order of the command. metric: the one that decides.
    means: contestant -> metric -> its mean and 95 % interval, of itself alone. comparisons: metric -> each pair.
    failed: what is told of the others. start: metric -> its mean before training."""

    names: list[str]
    metric: str
    runs: dict[str, list[Line]]
    means: dict[str, dict[str, Estimate]]
    comparisons: dict[str, list[Comparison]]
    failed: list[str]
    start: dict[str, float]

    @property
    def ordered(self) -> list[str]:
        """The metrics, the one that decides first."""
        return [self.metric, *(name for name in self.start if name != self.metric)]

    @property
    def ranked(self) -> list[str]:
        """The contestants, best first in the metric that decides."""
        sign = METRICS[self.metric].better or -1
        return sorted(self.names, key=lambda name: -sign * self.means[name][self.metric].mean)


def outcome(lines: Sequence[Line], names: Sequence[str], metric: str | None, baseline: str | None) -> Outcome:
    """Of the lines of all runs. metric: the one that decides; None: the reward where there is one, else accuracy."""
    runs = {name: sorted((x for x in lines if x["contestant"] == name), key=lambda x: x["seed"]) for name in names}
    failed = [
        f"{name} with seed {line['seed']} failed: {line['error']}"
        for name in names
        for line in runs[name]
        if line["status"] != "ok"
    ]
    well = [name for name in names if runs[name] and all(line["status"] == "ok" for line in runs[name])]
    first: Mapping[str, float] = runs[well[0]][0]["curve"][0] if well else {}
    start = {name: first[name] for name in METRICS if name in first}
    values: dict[str, dict[str, Values]] = {
        one: {name: np.array([line["rows"][one] for line in runs[name]]) for name in well} for one in start
    }
    means: dict[str, dict[str, Estimate]] = {name: {} for name in well}
    for one, of_metric in values.items():
        for name, table in of_metric.items():
            means[name][one] = Bootstrap.of(*table.shape).estimate(table)
    against = baseline if baseline in well else None
    comparisons = {one: compared(of_metric, against) for one, of_metric in values.items()}
    return Outcome(
        well,
        metric or ("reward" if "reward" in start else "accuracy"),
        {name: runs[name] for name in well},
        means,
        comparisons,
        failed,
        start,
    )


def verdict(comparison: Comparison, metric: str) -> str:
    """In words: which of the two is better in this metric, where its interval says so."""
    sign, better = comparison.difference.sign, METRICS[metric].better
    if not sign:
        return "no difference seen"
    if not better:
        return f"{comparison.first if sign > 0 else comparison.second} has more"
    return f"{comparison.first if sign == better else comparison.second} is better"


def summary(found: Outcome) -> str:
    """One sentence of what the metric that decides says."""
    if len(found.names) < 2:
        return "there are no two contestants to compare"
    unlike = [one for one in found.comparisons[found.metric] if not alike(one)]
    if not unlike:
        return f"all have the same {found.metric} with every seed on every row, of which none is better"
    best = found.ranked[0]
    beaten: list[str] = []
    equal: list[str] = []
    for one in found.comparisons[found.metric]:
        if best in (one.first, one.second):
            other = one.second if one.first == best else one.first
            (beaten if one.difference.sign else equal).append(other)
    said = [f"{best} has the best {found.metric}"]
    said += [f"better than {listed(beaten)}"] if beaten else []
    said += [f"no difference seen to {listed(equal)}"] if equal else []
    return ", ".join(said)


def alike(comparison: Comparison) -> bool:
    """Whether nothing in which the two differ was met: how large a difference could be is unknown then."""
    found = comparison.difference
    return found.low == found.mean == found.high == 0


def advice(found: Outcome) -> str:
    """What would narrow the intervals of the metric that decides: seeds, or rows."""
    unsure = [one for one in found.comparisons.get(found.metric, []) if not (one.difference.sign or alike(one))]
    if not unsure:
        return ""
    share = float(np.mean([one.difference.of_seeds for one in unsure]))
    widest = max((one.difference.high - one.difference.low) / 2 for one in unsure)
    seeds = len(found.runs[found.names[0]])
    more = f"more --seeds than {seeds}" if share >= 0.5 else "more --eval_rows"
    return (
        f"where no difference is seen, one of up to {widest:.2g} could be: {share:.0%} of what is uncertain lies "
        f"between seeds, so {more} would show smaller ones"
    )


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def as_lines(found: Outcome) -> list[dict[str, Any]]:
    """Each comparison as a line of JSON."""
    return [
        {
            "metric": metric,
            "first": one.first,
            "second": one.second,
            "difference": one.difference.mean,
            "low": one.difference.low,
            "high": one.difference.high,
            "of_seeds": one.difference.of_seeds,
            "comparisons": len(those),
            "verdict": verdict(one, metric),
        }
        for metric, those in found.comparisons.items()
        for one in those
    ]
