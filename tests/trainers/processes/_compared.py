"""Runs of several processes beside those of one."""

from pathlib import Path

import pytest

from . import _worker
from ._jobs import STEPS, words_for
from ._launch import differences, log_of

CLOSE = 2e-6  # of weights that a step moves by 1e-4
# Of whole models a weight in 10,000 may differ by more, by a tenth of a step: where a gradient is about AdamW's epsilon
# (1e-8) its rounding error moves a weight as far as others their gradient.
FAR, RARE = 1e-5, 1e-4
ROUNDING = 1e-5  # of figures: a log-ratio is the difference of two log-probabilities near -40 in float32
MEASURED = {"tokens_per_s", "step_ms", "peak_mem_mib", "rollout_ms", "rollout_tokens_per_s", "hash"}


def jobs_of(settings, folder, kind, world):
    return [
        {"words": words_for(*s[:2], folder, folder / f"{kind}{world}" / name / "out", *s[2:]), "kind": kind}
        for name, s in settings.items()
    ]


class Truth:
    """What one process makes of a setting, once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known = folder, set()

    def __call__(self, name, setting):
        output = self.folder / "one" / name / "out"
        if name not in self.known:
            self.known.add(name)
            _worker.train(words_for(*setting[:2], self.folder, output, *setting[2:]))
        return output


def assert_equal(one: Path, other: Path) -> None:
    """The logs of two runs and what they have saved."""
    alone, together = log_of(one), log_of(other)
    assert len(alone) == len(together) == STEPS
    for mine, theirs in zip(alone, together, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - MEASURED:
            assert theirs[name] == pytest.approx(mine[name], rel=5e-5, abs=ROUNDING), (mine["step"], name)
    differ = differences(one, other)
    assert differ.max() < FAR and (differ >= CLOSE).float().mean() < RARE


def assert_alike(ranks, name) -> None:
    """What the processes themselves say of a run."""
    cuts = [rank[name]["cut"] for rank in ranks]
    assert len({tuple(count for count, _ in cut) for cut in cuts}) == 1, "or a collective would hang"
    rows = [{k: v for k, v in rank[name]["row"].items() if k not in MEASURED - {"peak_mem_mib"}} for rank in ranks]
    assert all(row == rows[0] for row in rows), "every process knows the metrics of all"
