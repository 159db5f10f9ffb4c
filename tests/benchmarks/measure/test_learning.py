"""The suite `learning`: both contestants begin alike, learn as long, and are graded alike."""

import math
import statistics

import pytest

from logratio.benchmarks.measure import learning
from logratio.benchmarks.measure.learning import Curve, LearningCase, run
from logratio.benchmarks.reporting.learned import learning_tables, of_all_seeds, of_questions
from logratio.trainers.data.rows import Rows
from logratio.trainers.demo import Score


def test_both_learn_from_the_same_start_for_as_long(monkeypatch):
    (held_out, training), few = learning.questions(), []
    monkeypatch.setattr(learning, "CHECK_EVERY", 1)
    monkeypatch.setattr(learning, "questions", lambda: (Rows("few", held_out.rows[:20]), training))
    monkeypatch.setattr(learning, "arithmetic_rows", lambda kind, split="train": few or learning_rows(few))
    found = run(LearningCase(seed=0, prompts=4, group=2, steps=3, start=0.0))
    assert {name: figures["status"] for name, figures in found.items()} == {"logratio": "ok", "trl": "ok"}
    assert found["logratio"]["accuracy_before"] == found["trl"]["accuracy_before"]
    for figures in found.values():
        assert [step for step, _, _ in figures["curve"]] == [1, 2, 3]
        seconds = [seconds for _, seconds, _ in figures["curve"]]
        assert 0 < seconds[0] < seconds[1] < seconds[2] <= figures["cpu_s"]


def learning_rows(few):
    few += [{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(10, 30)]
    return few


def test_the_grading_is_not_in_the_time(monkeypatch):
    clock = iter([0.0, 10.0, 110.0, 113.0])  # made; a step is done, graded; the next is done
    monkeypatch.setattr(learning.time, "process_time", lambda: next(clock, 200.0))
    monkeypatch.setattr(learning, "CHECK_EVERY", 1)
    curve = Curve()
    curve.after(1, lambda: Score(0.5, 0.01))
    curve.after(2, lambda: Score(0.96, 0.01))
    figures = curve.figures(Score(0.95, 0.01))
    assert figures["curve"] == [(1, 10.0, 0.5), (2, 13.0, 0.96)]
    assert (figures["steps_to_goal"], figures["cpu_s_to_goal"]) == (2, 13.0)


def row(contestant, seed, accuracy, cpu_s):
    case = {"suite": "learning", "case": f"seed{seed}", "seed": seed, "prompts": 32, "group": 8, "steps": 600}
    measured = {"accuracy": accuracy, "accuracy_se": 0.01, "accuracy_before": 0.4, "cpu_s": cpu_s, "status": "ok"}
    return case | measured | {"contestant": contestant, "gpu": "cpu", "certificate": {}}


def test_the_table_has_a_line_for_each_seed_and_one_for_all():
    ours = [0.95, 0.96, 0.98]
    rows = [row("logratio", seed, accuracy, 100.0) for seed, accuracy in enumerate(ours)]
    rows += [row("trl", seed, 0.9, 200.0) for seed in range(3)]
    right, cost = learning_tables(rows, absolute=False)
    # by hand: 0.95 * 0.05 / 0.01^2 = 475 questions: (0.95 + 0.00404 -+ 1.96 sqrt(0.0001 + 0.0000043)) / 1.00809
    assert "| 0 | 32 | 8 | 600 | 95.0% (92.7% to 96.6%) | 90.0% (87.9% to 91.8%) |" in right
    half = 4.303 * statistics.stdev(ours) / math.sqrt(3)
    mean = statistics.mean(ours)
    assert f"| all | 32 | 8 | 600 | 96.3% ({mean - half:.1%} to 100.0%) | 90.0% (90.0% to 90.0%) |" in right
    assert "| 0 | 32 | 8 | 600 | 1.00× | 2.00× |" in cost and "100" not in cost
    assert "100 s, 1.00×" in learning_tables(rows, absolute=True)[1]
    assert of_all_seeds(rows[:1]) == []
    perfect = row("trl", 0, 1.0, 1.0) | {"accuracy_se": 0.0}
    low, high = of_questions(perfect)
    assert high == 1.0 and low == pytest.approx(600 / (600 + 1.96**2), abs=1e-5), "that none was wrong proves little"


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_the_quantile_of_students_distribution_is_the_published_one(seeds):
    """By integration of its density: 97.5 % are below it."""
    from logratio.benchmarks.reporting.learned import STUDENT

    freedom, steps = seeds - 1, 200_000
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    width = STUDENT[seeds] / steps
    below = sum((1 + ((i + 0.5) * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps)) * scale * width
    assert below == pytest.approx(0.475, abs=2e-5)
