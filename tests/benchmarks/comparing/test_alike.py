"""Identical losses that differ in their seeds alone, which means in the order of their data and all that is drawn."""

import random

import numpy as np
import pytest

from logratio.benchmarks.comparing.beginning import begin
from logratio.benchmarks.comparing.contestants import contestant
from logratio.benchmarks.comparing.intervals import compared
from logratio.benchmarks.comparing.rows import material
from logratio.benchmarks.comparing.running import Budget, Job, run_job
from logratio.benchmarks.comparing.scores import Asked

SEEDS, SPLITS = 8, 200


@pytest.mark.slow
def test_nineteen_of_twenty_times_they_are_said_not_to_differ(tmp_path):
    """Eight runs of DPO, dealt two hundred times to two contestants of three seeds each."""
    data = material("shopping", "train", None, 40)
    begin("tiny", data, 40, tmp_path, print)
    words = ["--model_name_or_path", str(tmp_path / "start"), "--lr_scheduler_type", "constant"]
    config = contestant("dpo --beta 0.5 --learning_rate 1e-4 --batch_size 16").config(words)
    asked = Asked(("logratio.trainers.data.tasks.shopping:cheap_basket",), 2, 6)
    shared = {"checks": 1, "asked": asked, "train": data.train, "held_out": data.held_out, "folder": tmp_path}
    runs = [run_job(Job("dpo", config, seed, Budget("steps", 10), threads=1, **shared)) for seed in range(SEEDS)]
    deal, metrics = random.Random(0), ("reward", "greedy", "accuracy", "nll", "kl")
    differ = dict.fromkeys(metrics, 0)
    for _ in range(SPLITS):
        order = deal.sample(range(SEEDS), 6)
        for metric in metrics:
            a, b = (np.array([runs[i]["rows"][metric] for i in part]) for part in (order[:3], order[3:]))
            (one,) = compared({"a": a, "b": b})
            differ[metric] += one.difference.sign != 0
    print(differ)
    assert all(count / SPLITS <= 0.05 for count in differ.values()), differ
