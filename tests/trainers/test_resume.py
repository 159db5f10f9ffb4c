"""A run that goes on from a checkpoint ends as the one that never stopped, to the bit; and what may not change is told.

What `tests/chaos.py` finds out by killing runs at random moments is here one case at a time, and named.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from logratio.trainers import cli, health, loop, resume
from logratio.trainers.checkpoints import checkpoint
from logratio.trainers.checkpoints.folder import checkpoints_in, damage
from logratio.trainers.logs.journal import read_chain
from logratio.trainers.policy.policy import Policy

ROWS = [
    {
        "prompt": f"{i % 5}+{i % 3}=",
        "completion": str(i % 5 + i % 3),
        "chosen": str(i % 5 + i % 3),
        "rejected": str(i),
        "reference": str(i % 5 + i % 3),
        "label": i % 2 == 0,
    }
    for i in range(10)
]
COLUMNS = {
    "sft": ("prompt", "completion"),
    "kto": ("prompt", "completion", "label"),
    "grpo": ("prompt",),
    "tpo": ("prompt", "chosen", "rejected", "reference"),
}
SHORT = ["--max_steps", "6", "--batch_size", "4", "--learning_rate", "1e-2", "--save_steps", "3"]
LORA = ["--lora_r", "2", "--lora_dropout", "0.3"]
SYNC = ["--sync_ref_model", "--ref_model_sync_steps", "2"]
ROLL = ["--num_generations", "3", "--max_completion_length", "5", "--num_iterations", "2", "--reward_funcs", "own:odd"]
CASES = {
    "sft": [],
    "dpo": [*LORA, *SYNC],
    "dpo full": [*SYNC, "--loss_type", "beta_dpo"],
    "dpo precomputed": [*LORA, "--precompute_ref_log_probs"],
    "dpo streamed": [*LORA, "--streaming", "--streaming_buffer", "3"],  # over the end of an epoch
    "dpo weighted": [*LORA, "--dataset_name", "rows.jsonl", "rows.jsonl", "--dataset_weights", "2", "1"],
    "kto": [*LORA, "--loss_type", "bco"],
    "orpo": LORA,
    "cpo": LORA,
    "tpo": LORA,
    "grpo": [*LORA, *SYNC, *ROLL, "--beta", "0.1"],  # 3 steps end in the middle of a set of rollouts
    "grpo full": [*ROLL, "--beta", "0.1", "--reward_kl_coef", "0.1"],
}
LATEST = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own.py").write_text(
        "def odd(completions, **_):\n    return [sum(map(ord, c)) % 5 / 5 for c in completions]\n"
    )


def train(method, *options, output="out", status=0):
    names = COLUMNS.get(method, ("prompt", "chosen", "rejected"))
    Path("rows.jsonl").write_text("".join(json.dumps({n: row[n] for n in names}) + "\n" for row in ROWS))
    words = ["train", method, "--dataset_name", "rows.jsonl", *SHORT, "--output_dir", output, *options]
    assert cli.main(words) == status


def weights(folder):
    name = "adapter_model.safetensors" if Path(folder, "adapter_config.json").exists() else "model.safetensors"
    return load_file(Path(folder) / name)


def log(folder):
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    assert rows == [row for row, _ in read_chain(Path(folder, "metrics.jsonl"))]
    return rows


def assert_same(one, other):
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert log(one)[-1]["hash"] == log(other)[-1]["hash"]
    assert [row["step"] for row in log(other)] == list(range(1, 7))


def back_to(step, folder="out"):
    """As if the run had been killed behind its checkpoint of this step: what came later is not there."""
    for later, path in checkpoints_in(Path(folder)):
        if later > step:
            shutil.rmtree(path)
    for path in Path(folder).glob("*model*.safetensors"):
        path.unlink()


QUICK = ("dpo", "kto", "grpo")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_it_ends_with_the_same_bits(case):
    method = case.split()[0]
    train(method, *CASES[case], output="whole")
    train(method, *CASES[case])
    back_to(3)
    before = log("out")[:3]
    train(method, *CASES[case], *LATEST)
    assert_same("whole", "out")
    assert log("out")[:3] == before
    state = json.loads(Path("out/checkpoint-3/trainer_state.json").read_text())
    assert bool(state["loss_state"]) == (case in ("kto", "dpo full"))
    assert Path("out/checkpoint-3/rollouts.json").exists() == (method == "grpo")
    assert Path("out/checkpoint-3/reference.safetensors").exists() == ("--sync_ref_model" in CASES[case])


@pytest.mark.slow
def test_the_state_of_every_part_matters(monkeypatch):
    """Each part of the checkpoint that is left out in going on is seen in the bits: the test above can fail."""
    words = [*LORA, *SYNC, *ROLL, "--beta", "0.1"]
    train("grpo", *words)
    found = {}
    for name, call in {
        "weights": "load_weights",
        "optimizer": "load_optimizer_state",
        "random states": "set_random_states",
        "nothing": "name_of",
    }.items():
        shutil.copytree("out", name)
        back_to(3, name)
        with monkeypatch.context() as patch:
            if name != "nothing":
                patch.setattr(resume, call, lambda *a, **k: None)
            train("grpo", *words, *LATEST, output=name)
        a, b = weights("out"), weights(name)
        found[name] = all(torch.equal(a[k], b[k]) for k in a)
    assert found == {"weights": False, "optimizer": False, "random states": False, "nothing": True}


def test_memory_may_change_on_the_way_and_hardly_the_result():
    train("dpo", *LORA[:2], output="whole")
    train("dpo", *LORA[:2])
    back_to(3)
    train("dpo", *LORA[:2], *LATEST, "--micro_batch_tokens", "40", "--save_steps", "1", "--save_total_limit", "2")
    a, b = weights("whole"), weights("out")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5
    assert [step for step, _ in checkpoints_in(Path("out"))] == [6, 5]


@pytest.mark.parametrize("case", ["grpo", pytest.param("dpo", marks=pytest.mark.slow)])
def test_a_run_that_found_out_what_fits_into_memory_goes_on_with_it(case, monkeypatch, capsys):
    """Groups of rollouts that were divided, in the middle of their steps; and what was said is not said again."""
    forward = Policy.forward

    def limited(policy, batch):
        if batch.input_ids.numel() > 18:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(policy, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "forward", limited)
        train(case, *CASES[case])
    found = json.loads(Path("out/checkpoint-3/trainer_state.json").read_text())["micro_batch_tokens"]
    assert found < 18 and "out of memory" in capsys.readouterr().out
    shutil.copytree("out", "whole")
    back_to(3)
    train(case, *CASES[case], *LATEST)
    assert_same("whole", "out")
    assert "out of memory" not in capsys.readouterr().out


def test_what_was_said_of_a_run_is_not_said_again(monkeypatch, capsys):
    monkeypatch.setattr(health, "STEPS", 2)
    words = ["--learning_rate", "50", "--loss_type", "kto"]  # margins of thousands
    train("kto", *words)
    assert capsys.readouterr().out.count("the gradient is exactly 0") == 1
    back_to(3)
    state = json.loads(Path("out/checkpoint-3/trainer_state.json").read_text())
    assert state["health"]["told"] == ["zero"]
    train("kto", *words, *LATEST)
    assert "the gradient is exactly 0" not in capsys.readouterr().out
    Path("alike.py").write_text("def same(completions, **_):\n    return [1.0 for _ in completions]\n")
    train("grpo", *ROLL[:-1], "alike:same", "--max_steps", "12", "--save_steps", "6", output="alike")
    assert capsys.readouterr().out.count("the rewards told no completion") == 1
    for step, folder in checkpoints_in(Path("alike")):
        state = json.loads((folder / "trainer_state.json").read_text())
        told = ["alike"] if step == 12 else []
        assert state["rollouts"] == {"generation_rows": 256, "watch": {"alike": step // 2, "told": told}}


def test_another_folder_goes_on_with_a_copy_of_the_log():
    train("orpo", *LORA, output="whole")
    shutil.copytree("whole", "start")
    train("orpo", *LORA, "--resume_from_checkpoint", "start/checkpoint-3", output="out")
    assert_same("whole", "out")
    assert len(log("start")) == 6 and not Path("out/checkpoint-3").exists()


def test_a_run_that_was_done_only_saves_again(capsys):
    train("sft")
    kept = weights("out")
    back_to(6)
    capsys.readouterr()
    train("sft", *LATEST)
    assert "6 steps done; saved in out" in capsys.readouterr().out
    assert all(torch.equal(kept[k], v) for k, v in weights("out").items()) and len(log("out")) == 6


def test_without_a_checkpoint_latest_begins(capsys):
    train("sft", *LATEST)
    assert "out has no checkpoint to go on from: the run begins" in capsys.readouterr().out
    assert len(log("out")) == 6


def test_a_damaged_checkpoint_is_left_aside_for_the_one_before(capsys):
    train("sft", "--save_steps", "2", output="whole")
    train("sft", "--save_steps", "2")
    back_to(4)
    path = Path("out/checkpoint-4/optimizer.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    capsys.readouterr()
    train("sft", "--save_steps", "2", *LATEST)
    shown = capsys.readouterr().out
    assert "out/checkpoint-4 is damaged and left aside: optimizer.safetensors is not as it was written" in shown
    assert "going on from out/checkpoint-2" in shown
    assert_same("whole", "out")
    assert all(damage(path) is None for _, path in checkpoints_in(Path("out")))


OTHER = {
    "options": (
        ["--learning_rate", "1e-3", "--beta", "0.2", "--lora_r", "2"],
        "out/checkpoint-6 is of a run with other options (beta 0.2, was 0.1; learning_rate 0.001, was 0.01; lora_alpha "
        "32.0, was None; lora_dropout 0.0, was None; lora_r 2, was 0; lora_target_modules all-linear, was None): go on "
        "with the same ones, or start a new run in another --output_dir",
    ),
    "method": ([], "out/checkpoint-6 is of a run with other options ("),
    "data": (
        [],
        "out/checkpoint-6 was trained on other data than are there now, under the same name: put the old one back, or "
        "start a new run in another --output_dir",
    ),
    "log": ([], "out/metrics.jsonl is not the log of the run that goes on: up to step 6 it has other lines"),
    "folder": (["--resume_from_checkpoint", "out/no"], "--resume_from_checkpoint out/no: there is no such folder"),
    "format": ([], "out/checkpoint-6 has the format 0, this version reads 1"),
}


@pytest.mark.parametrize("what", OTHER)
def test_another_run_is_refused_and_told_apart(what, capsys, monkeypatch):
    train("dpo")
    options, message = OTHER[what]
    if what == "data":
        monkeypatch.setitem(ROWS[0], "chosen", "7")
    if what == "log":
        Path("out/metrics.jsonl").write_text(Path("out/metrics.jsonl").read_text().replace('"step": 2', '"step": 3'))
    if what == "format":
        monkeypatch.setattr("logratio.trainers.resume.FORMAT", 0)
        shutil.rmtree("out")
        train("dpo")
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    capsys.readouterr()
    train("orpo" if what == "method" else "dpo", *LATEST, *options, status=1)
    error = capsys.readouterr().err
    assert error.startswith(f"logratio: {message}") and error.count("\n") == 1, error
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before


def test_other_weights_under_the_same_name_are_refused(capsys):
    train("sft", "--max_steps", "1", output="start")
    train("dpo", *LORA, "--model_name_or_path", "start")
    shutil.rmtree("start")
    train("sft", "--max_steps", "2", output="start")
    capsys.readouterr()
    train("dpo", *LORA, "--model_name_or_path", "start", *LATEST, status=1)
    assert "was trained from other weights than are there now, under the same name" in capsys.readouterr().err


def test_other_versions_are_said(capsys, monkeypatch):
    train("sft")
    known = checkpoint.versions()
    monkeypatch.setattr(checkpoint, "versions", lambda: {**known, "torch": "9.9"})
    capsys.readouterr()
    train("sft", *LATEST)
    said = "other versions than when out/checkpoint-6 was written, so that bits may differ: torch 9.9 (was "
    assert said in " ".join(capsys.readouterr().out.split())


def test_the_best_evaluation_is_what_is_saved(capsys, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 1.5, 4.0, 5.0])
    monkeypatch.setattr(loop, "evaluate", lambda run: {"loss": next(losses)})
    options = ["--eval_size", "2", "--eval_steps", "1", "--load_best_model_at_end", "--save_total_limit", "2"]
    train("sft", *options)
    assert [step for step, _ in checkpoints_in(Path("out"))] == [6, 2]
    best, last, saved = (weights(f) for f in ("out/checkpoint-2", "out/checkpoint-6", "out"))
    assert all(torch.equal(best[k], saved[k]) for k in best) and not all(torch.equal(last[k], saved[k]) for k in last)
    assert "saved are the weights of step 2, whose eval_loss 1 is the best" in capsys.readouterr().out


def test_training_ends_when_evaluations_get_no_better(capsys, monkeypatch):
    values = iter([0.5, 0.7, 0.6, 0.7, 0.9])
    monkeypatch.setattr(loop, "evaluate", lambda run: {"loss": 1.0, "rewards/margins": next(values)})
    early = ["--early_stopping_patience", "2", "--metric_for_best_model", "rewards/margins"]
    train("dpo", *LORA, "--eval_size", "2", "--eval_steps", "1", *early)
    assert [row["step"] for row in log("out")] == [1, 2, 3, 4]
    assert "step 4: 2 evaluations without a better eval_rewards/margins: training ends" in capsys.readouterr().out
    shutil.rmtree("out")
    train(
        "dpo",
        "--eval_size",
        "2",
        "--eval_steps",
        "1",
        "--early_stopping_patience",
        "2",
        "--metric_for_best_model",
        "x",
        status=1,
    )
    assert "--metric_for_best_model eval_x: the evaluation has only eval_loss" in capsys.readouterr().err


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


def test_run_config_given_back_reproduces_the_run():
    train("dpo", *LORA, "--loss_type", "ipo", "--label_smoothing", "0.0", "--save_total_limit", "1")
    about = json.loads(Path("out/run_config.json").read_text())["about"]
    assert about.keys() == {"commit", "versions", "num_processes", "data", "frozen"}
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
