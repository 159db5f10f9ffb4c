"""What a run keeps: the best weights, what a disk takes, and options that give the same run again."""

import json
from pathlib import Path

import pytest
import torch

from logratio.trainers import cli, loop, resume
from logratio.trainers.checkpoints import model
from logratio.trainers.checkpoints.folder import checkpoints_in
from logratio.trainers.data.table import streaming
from logratio.trainers.logs import journal

from ._runs import LATEST, LORA, ROWS, assert_same, log, train, weights

pytestmark = pytest.mark.usefixtures("workspace")


def test_the_best_evaluation_is_what_is_saved(capsys, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 1.5, 4.0, 5.0])
    monkeypatch.setattr(loop, "evaluate", lambda run: {"eval_loss": next(losses)})
    options = ["--eval_size", "2", "--eval_steps", "1", "--load_best_model_at_end", "--save_total_limit", "2"]
    train("sft", *options)
    assert [step for step, _ in checkpoints_in(Path("out"))] == [6, 2]
    best, last, saved = (weights(f) for f in ("out/checkpoint-2", "out/checkpoint-6", "out"))
    assert all(torch.equal(best[k], saved[k]) for k in best) and not all(torch.equal(last[k], saved[k]) for k in last)
    assert "saved are the weights of step 2, whose eval_loss 1 is the best" in capsys.readouterr().out


def test_training_ends_when_evaluations_get_no_better(capsys, monkeypatch):
    values = iter([0.5, 0.7, 0.6, 0.7, 0.9])
    monkeypatch.setattr(loop, "evaluate", lambda run: {"eval_loss": 1.0, "eval_rewards/margins": next(values)})
    early = ["--early_stopping_patience", "2", "--metric_for_best_model", "rewards/margins"]
    train("dpo", *LORA, "--eval_size", "2", "--eval_steps", "1", *early)
    assert [row["step"] for row in log("out")] == [1, 2, 3, 4]
    assert "step 4: 2 evaluations without a better eval_rewards/margins: training ends" in capsys.readouterr().out


def test_a_metric_that_no_evaluation_has_costs_no_step(capsys):
    """It is known with the first evaluation: a run that has compared none goes on with another metric, and ends as one
    that had it from the beginning."""
    words = ["dpo", *LORA, "--eval_size", "2", "--eval_steps", "2", "--load_best_model_at_end"]
    train(*words, "--metric_for_best_model", "x", status=1)
    said = capsys.readouterr().err
    assert "--metric_for_best_model eval_x: the evaluation has only eval_" in said
    assert said.endswith("; give one of these with --resume_from_checkpoint latest, which goes on behind step 2\n")
    assert [row["step"] for row in log("out")] == [1, 2] and "eval_loss" in log("out")[1]
    other = ["--metric_for_best_model", "rewards/margins"]
    train(*words, *other, "--resume_from_checkpoint", "latest")
    train(*words, *other, output="whole")
    assert_same("out", "whole")
    train(*words, "--metric_for_best_model", "rewards/accuracies", "--resume_from_checkpoint", "latest", status=1)
    assert "metric_for_best_model rewards/accuracies, was rewards/margins" in capsys.readouterr().err


def test_a_full_disk_in_a_save_costs_no_run(capsys, monkeypatch):
    save, full = resume.write_model, iter([False, True, False])

    def filling(policy, tokenizer, folder, weights):
        save(policy, tokenizer, folder, weights)
        if next(full):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "write_model", filling)
    train("sft", "--save_steps", "2")
    shown = capsys.readouterr().out
    said = "step 4: out/checkpoint-4 could not be saved: No space left on device; the run goes on, checkpoint-2 is"
    assert f"{said} the last" in " ".join(shown.split())
    assert [step for step, _ in checkpoints_in(Path("out"))] == [6, 2] and len(log("out")) == 6
    assert not list(Path("out").glob(".checkpoint*"))


def test_best_weights_that_the_disk_did_not_take_are_told(capsys, monkeypatch):
    losses, save = iter([3.0, 1.0, 2.0, 2.0, 4.0, 5.0]), resume.write_model
    monkeypatch.setattr(loop, "evaluate", lambda run: {"eval_loss": next(losses)})

    def filling(policy, tokenizer, folder, weights):
        save(policy, tokenizer, folder, weights)
        if folder.name.startswith(".checkpoint-2"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "write_model", filling)
    train("sft", "--eval_size", "2", "--eval_steps", "1", "--load_best_model_at_end")
    said = "the best weights, of step 2 with eval_loss 1, are not in out/checkpoint-2: saved are the last ones"
    assert said in " ".join(capsys.readouterr().out.split())
    last, saved = weights("out/checkpoint-6"), weights("out")
    assert all(torch.equal(last[k], saved[k]) for k in last)


def test_a_full_disk_in_the_end_is_told_with_how_to_go_on(capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    Path("rows.jsonl").write_text(json.dumps({"text": "1 and 2"}) + "\n")
    words = ["train", "sft", "--dataset_name", "rows.jsonl", "--max_steps", "2", "--output_dir", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(model, "write_model", full)
        for more, on in (
            ([], "train again"),
            (["--save_steps", "2"], "the same command with --resume_from_checkpoint"),
        ):
            assert cli.main([*words, *more]) == 1
            said = capsys.readouterr().err
            told = "logratio: the model could not be saved in out: No space left on device; make room, and "
            assert said.startswith(told + on)
    assert said.endswith(" latest goes on from checkpoint-2\n")
    assert cli.main([*words, "--save_steps", "2", *LATEST]) == 0
    assert Path("out/model.safetensors").is_file()


def test_lines_that_no_disk_took_are_told_in_the_end(capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.os, "pwrite", full)
    Path("rows.jsonl").write_text(json.dumps({"text": "1 and 2"}) + "\n")
    words = ["train", "sft", "--dataset_name", "rows.jsonl", "--max_steps", "2", "--output_dir", "out"]
    assert cli.main(words) == 1
    out, error = capsys.readouterr()
    assert "out/metrics.jsonl cannot be written (No space left on device): its lines wait" in out
    assert error == "logratio: out/metrics.jsonl could not be written: No space left on device\n"
    assert Path("out/model.safetensors").exists()


def test_run_config_given_back_reproduces_the_run():
    train("dpo", *LORA, "--loss_type", "ipo", "--label_smoothing", "0.0", "--save_total_limit", "1")
    about = json.loads(Path("out/run_config.json").read_text())["about"]
    assert about.keys() == {
        "commit",
        "versions",
        "num_processes",
        "device",
        "device_mem_mib",
        "data",
        "frozen",
        "configured",
    }
    assert cli.main(["train", "--config", "out/run_config.json", "--output_dir", "again"]) == 0
    assert_same("out", "again")
    one, other = (json.loads(Path(f, "run_config.json").read_text()) for f in ("out", "again"))
    assert other["train"].pop("output_dir") == "again" and one["train"].pop("output_dir") == "out"
    assert one == other


def test_run_config_of_a_loss_from_outside(capsys):
    Path("mine.py").write_text("from logratio.losses import SFTLoss\n\nclass Mine(SFTLoss):\n    pass\n")
    options = ["--dataset_name", "rows.jsonl", "--max_steps", "1"]
    Path("rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert cli.main(["train", "--loss", "mine:Mine", *options, "--output_dir", "out"]) == 0
    assert cli.main(["train", "--config", "out/run_config.json", "--output_dir", "again"]) == 0
    assert log("out")[-1]["hash"] == log("again")[-1]["hash"]
    assert cli.main(["train", "sft", "--config", "out/run_config.json"]) == 1
    assert "is of the method custom with the loss mine:Mine; leave yours out" in capsys.readouterr().err


FAILING = """
from pathlib import Path
from own import odd

def failing(completions, trainer_state, **columns):
    if trainer_state.global_step >= 4 and not Path("mended").exists():
        raise ConnectionError("503")
    return odd(completions, **columns)
"""


@pytest.mark.parametrize("of_a_set", [[], ["--steps_per_generation", "2"], ["--dynamic_sampling", "3"]])
def test_a_reward_that_fails_costs_no_step_behind_it(of_a_set, capsys):
    """The run goes on from what is kept, to the bits of one in which the reward never failed."""
    Path("failing.py").write_text(FAILING)
    roll = ["--num_generations", "3", "--max_completion_length", "5", "--reward_funcs", "failing:failing", *of_a_set]
    train("grpo", *roll, "--save_steps", "100", status=1)
    error = capsys.readouterr().err
    assert "logratio: step 5: the reward 'failing' raised ConnectionError: 503" in error
    assert error.endswith("; step 4 is kept: the same command with --resume_from_checkpoint latest goes on from it\n")
    Path("mended").touch()
    train("grpo", *roll, "--save_steps", "100", *LATEST)
    train("grpo", *roll, "--save_steps", "100", output="whole")
    assert_same("out", "whole")


def test_a_streamed_row_that_cannot_be_used_costs_no_step_before_it(capsys, monkeypatch):
    monkeypatch.setattr(streaming, "LOOKED_AT", 4)
    monkeypatch.setattr(streaming, "TOGETHER", 2)
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS]

    def written(last):
        Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:9], last]))

    words = ["sft", *LORA, "--streaming", "--no-shuffle", "--dataset_name", "mine.jsonl", "--batch_size", "2"]
    written({**rows[9], "completion": ""})
    train(*words, "--save_steps", "100", status=1)
    error = capsys.readouterr().err
    assert "logratio: step 5: mine.jsonl, line 10: 'completion' has no text to learn from" in error
    assert error.endswith("; step 4 is kept: the same command with --resume_from_checkpoint latest goes on from it\n")
    written(rows[9])
    train(*words, "--save_steps", "100", *LATEST)
    train(*words, "--save_steps", "100", output="whole")
    assert_same("out", "whole")
