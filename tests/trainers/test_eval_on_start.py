"""`--eval_on_start`: what the model is worth before the first step, as the log's line of step 0."""

import json
from pathlib import Path

import pytest

from logratio.trainers import cli
from logratio.trainers.logs.journal import TIMED

from ._runs import LATEST, ROLL, back_to, log, train, weights

HELD_OUT = ["--eval_size", "4"]
pytestmark = pytest.mark.usefixtures("workspace")


def figures(rows):
    return [{name: value for name, value in row.items() if name not in ("hash", *TIMED)} for row in rows]


@pytest.mark.parametrize(("method", "options"), [("dpo", ["--lora_r", "2", "--lora_dropout", "0.3"]), ("grpo", ROLL)])
def test_the_run_behind_it_is_the_same_run(method, options):
    train(method, *HELD_OUT, *options, output="plain")
    train(method, *HELD_OUT, *options, "--eval_on_start", output="begun")
    first, *rest = log("begun")
    assert figures(rest) == figures(log("plain"))
    assert all((a == b).all() for a, b in zip(weights("begun").values(), weights("plain").values(), strict=True))
    evaluated = {name for name in log("plain")[-1] if name.startswith("eval_")}
    assert set(first) == evaluated | {"step", "epoch", "num_tokens", "hash"}
    assert (first["step"], first["epoch"], first["num_tokens"]) == (0, 0.0, 0)


def test_it_is_the_evaluation_of_the_weights_that_training_starts_from():
    train("sft", *HELD_OUT, "--eval_on_start", "--max_steps", "1", "--learning_rate", "0")
    first, last = log("out")
    assert first["eval_loss"] == last["eval_loss"]


def test_it_is_no_best_checkpoint_and_no_patience_counts_from_it():
    best = ["--load_best_model_at_end", "--early_stopping_patience", "2", "--eval_steps", "1", "--learning_rate", "0"]
    train("sft", *HELD_OUT, "--eval_on_start", *best)
    assert [row["step"] for row in log("out")] == [0, 1, 2, 3]  # the first to be compared is step 1's


def test_a_run_that_goes_on_does_not_evaluate_again():
    train("sft", *HELD_OUT, "--eval_on_start", "--save_steps", "2")
    whole = figures(log("out"))
    back_to(2)
    train("sft", *HELD_OUT, "--eval_on_start", "--save_steps", "2", *LATEST)
    assert figures(log("out")) == whole


def test_the_run_s_page_has_it():
    train("sft", *HELD_OUT, "--eval_on_start")
    assert cli.main(["report", "out"]) == 0
    assert Path("out/report.html").exists()


def test_without_something_to_evaluate_on_it_is_refused(capsys):
    train("sft", "--eval_on_start", status=1)
    assert capsys.readouterr().err == (
        "logratio: --eval_on_start has nothing to evaluate on: add --eval_size or --dataset_test_split\n"
    )


def test_trl_s_option_is_taken(capsys):
    Path("trl.yaml").write_text("eval_on_start: true\neval_strategy: steps\nper_device_train_batch_size: 2\n")
    assert cli.main(["migrate", "trl.yaml", "--method", "sft", "--output", "ours.yaml"]) == 0
    assert "eval_on_start: true" in Path("ours.yaml").read_text()


def test_callbacks_see_it_and_the_mean_loss_does_not(monkeypatch):
    from logratio.trainers import SFTConfig, SFTTrainer

    rows = [{"prompt": f"{n} =", "completion": f" {n}"} for n in range(8)]
    args = SFTConfig("out", eval_on_start=True, eval_strategy="no", max_steps=2, report_to="none")
    trainer = SFTTrainer(model="tiny", args=args, train_dataset=rows[:6], eval_dataset=rows[6:])
    output = trainer.train()
    first, *rest = trainer.state.log_history
    assert first["step"] == 0 and "eval_loss" in first and "loss" not in first
    assert output.training_loss == pytest.approx(sum(row["loss"] for row in rest) / 2)
    assert json.loads(Path("out/metrics.jsonl").read_text().splitlines()[0])["eval_loss"] == first["eval_loss"]
