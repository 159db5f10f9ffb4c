"""One run of a comparison: the columns that it learns from, when it is scored and when it ends."""

import json
from types import SimpleNamespace

import pytest

from logratio.benchmarks.comparing.contestants import contestant
from logratio.benchmarks.comparing.rows import Material, as_kind
from logratio.benchmarks.comparing.running import Budget, Job, Watch, run_job
from logratio.benchmarks.comparing.scores import Asked
from logratio.losses import Kind

CONSTANT = ["--lr_scheduler_type", "constant"]
ROWS = [{"prompt": f"{i}=", "chosen": "a", "rejected": "bc", "margin": i / 2} for i in range(4)]


def job(spec, folder, **more):
    config = contestant(spec).config([*CONSTANT, "--batch_size", "2"])
    given = {"budget": Budget("steps", 1), "checks": 1, "asked": Asked((), 1, 2), "train": ROWS[:2], **more}
    return Job(spec, config, 0, held_out=ROWS[2:], folder=folder, threads=1, **given)


@pytest.mark.parametrize(("spec", "reads"), [("dpo:odpo", True), ("dpo", False), ("kto", False)])
def test_a_margin_goes_to_those_that_read_it(tmp_path, spec, reads):
    """All others would refuse the column."""
    one = job(spec, tmp_path)
    said = run_job(one)
    assert said["status"] == "ok", said
    assert all(("margin" in json.loads(line)) is reads for line in one.data.read_text().splitlines())
    assert set(said["rows"]) == {"accuracy", "nll", "kl", "length"} and said["own_loss"] > 0


def test_pairs_with_and_without_a_margin_are_two_files(tmp_path):
    assert job("dpo:odpo", tmp_path).data != job("dpo", tmp_path).data == job("orpo", tmp_path).data


def test_a_margin_is_no_column_of_another_kind_nor_of_rewards():
    data = Material(ROWS, [{**row, "answer": "a"} for row in ROWS], [])
    assert data.columns == {"answer"}
    assert all("margin" not in row for kind in Kind for row in as_kind(ROWS, kind))


def test_what_the_comparison_decides_of_a_run(tmp_path):
    basket = ("logratio.trainers.data.tasks.shopping:cheap_basket",)
    asked = Asked(basket, 2, 7)
    of_steps, of_tokens = (
        Job("a", contestant("kto").config(["--batch_size", "4", *CONSTANT]), 3, budget, 1, asked, ROWS, ROWS, tmp_path)
        for budget in (Budget("steps", 9), Budget("tokens", 9))
    )
    config = of_steps.resolved()
    assert (config.train.seed, config.train.max_steps, config.data.shuffle) == (3, 9, False)
    assert config.train.batch_size == 8, "both rows of each of four pairs"
    assert config.data.dataset_name == (str(of_steps.data),)
    assert of_tokens.resolved().train.max_steps > 10**5, "tokens end it"
    own = contestant("grpo").config(["--batch_size", "4", *CONSTANT])
    grpo = Job("b", own, 3, Budget("steps", 9), 1, asked, ROWS, ROWS, tmp_path).resolved()
    assert grpo.train.batch_size == 4 and grpo.loss.max_completion_length == 7
    assert grpo.rollout.reward_funcs == basket


def watched(budget, checks, rows):
    """(of each step whether it is the last, the line of costs of each time that the policy was scored)"""
    scored = []
    job = SimpleNamespace(budget=budget, checks=checks)
    watch = Watch(job, lambda: scored.append(len(scored)) or {"nll": [1.0, 2.0, 6.0], "unknown": [0.0]})
    ends = [watch(None, row) for row in rows]
    assert all(point["nll"] == 3 and "unknown" not in point for point in watch.curve)
    return ends, [[point[unit] for unit in ("steps", "tokens", "seconds")] for point in watch.curve]


def test_a_run_is_scored_evenly_over_its_budget_and_where_it_ends():
    rows = [{"step": step, "num_tokens": 30 * step, "step_ms": 500.0} for step in range(1, 5)]
    last = [False, False, False, True]
    assert watched(Budget("steps", 4), 2, rows) == (last, [[2, 60, 1.0], [4, 120, 2.0]])
    assert watched(Budget("tokens", 100), 1, rows) == (last, [[4, 120, 2.0]])
    assert watched(Budget("seconds", 1.9), 3, rows) == (last, [[2, 60, 1.0], [3, 90, 1.5], [4, 120, 2.0]])
