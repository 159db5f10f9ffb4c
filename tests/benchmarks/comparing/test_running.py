"""One run of a comparison: the columns that it learns from, when it is scored and when it ends."""

import json

import pytest

from logratio.benchmarks.comparing.contestants import contestant
from logratio.benchmarks.comparing.rows import Material, as_kind
from logratio.benchmarks.comparing.running import Budget, Job, run_job
from logratio.benchmarks.comparing.scores import Asked
from logratio.losses import Kind

ROWS = [{"prompt": f"{i}=", "chosen": "a", "rejected": "bc", "margin": i / 2} for i in range(4)]


def job(spec, folder, **more):
    config = contestant(spec).config(["--lr_scheduler_type", "constant", "--batch_size", "2"])
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
