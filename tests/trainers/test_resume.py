"""A run that goes on from a checkpoint ends as the one that never stopped, to the bit; and what may not change is told.

What `tests/chaos.py` finds out by killing runs at random moments is here one case at a time, and named.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from logratio.trainers import health, resume
from logratio.trainers.checkpoints import checkpoint
from logratio.trainers.checkpoints.folder import checkpoints_in, damage, write_manifest, write_whole
from logratio.trainers.policy.policy import Policy

from ._runs import LATEST, LORA, ROLL, ROWS, SYNC, assert_same, back_to, completions, log, train, weights

pytestmark = pytest.mark.usefixtures("workspace")

CASES = {
    "sft": ["--loss_type", "asft"],  # which is held to where the first run began
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
    "grpo several": [
        *LORA,
        *SYNC,
        *ROLL,
        "--beta",
        "0.1",
        "--steps_per_generation",
        "2",
    ],  # 3 steps end in the middle of four
    "grpo dynamic": [
        *(
            *LORA,
            *SYNC,
            "--beta",
            "0.1",
            *ROLL[:-1],
            "own:now_and_then",
            "--steps_per_generation",
            "2",
            "--dynamic_sampling",
            "3",
        ),
    ],
    "grpo full": [*ROLL, "--beta", "0.1", "--reward_kl_coef", "0.1"],
}

QUICK = ("dpo", "kto", "grpo", "grpo dynamic")
SAMPLED = {  # step that a completion was sampled for, of 4, 4 and 2 prompts in turn
    "grpo": [1] * 12 + [3] * 12 + [5] * 6,
    "grpo full": [1] * 12 + [3] * 12 + [5] * 6,
    "grpo several": [1] * 24 + [5] * 18,
}


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
    if method == "grpo":
        rows = completions("out")
        if case == "grpo dynamic":
            assert {row["step"] for row in rows if row["advantage"] is None} == {1, 5}
        else:
            assert [row["step"] for row in rows] == SAMPLED[case]
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


@pytest.mark.parametrize("case", ["dpo", pytest.param("grpo", marks=pytest.mark.slow)])
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
        told = ["alike", "clipped"] if step == 12 else ["clipped"]
        watch = {"alike": step // 2, "constant": {"same": [1.0, step // 2]}, "told": told}
        assert state["rollouts"] == {"generation_rows": 256, "watch": watch}


def test_another_folder_goes_on_with_a_copy_of_the_log():
    train("orpo", *LORA, output="whole")
    shutil.copytree("whole", "start")
    train("orpo", *LORA, "--resume_from_checkpoint", "start/checkpoint-3", output="out")
    assert_same("whole", "out")
    assert len(log("start")) == 6 and not Path("out/checkpoint-3").exists()


def test_completions_are_copied_into_another_folder_up_to_where_it_goes_on():
    train("grpo", *LORA, *ROLL, output="whole")
    shutil.copytree("whole", "start")
    train("grpo", *LORA, *ROLL, "--resume_from_checkpoint", "start/checkpoint-3", output="out")
    assert_same("whole", "out")
    assert completions("start") == completions("whole") != None  # noqa: E711


def test_a_run_that_was_done_only_saves_again(capsys):
    train("sft")
    kept = weights("out")
    back_to(6)
    capsys.readouterr()
    train("sft", *LATEST)
    assert "6 steps done; saved in out" in capsys.readouterr().out
    assert all(torch.equal(kept[k], v) for k, v in weights("out").items()) and len(log("out")) == 6


def test_one_step_is_not_several(capsys):
    train("sft", "--max_steps", "1")
    assert "\n1 step done; saved in out\n" in capsys.readouterr().out


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
    "no state": (
        ["--resume_from_checkpoint", "out/base_model"],
        "--resume_from_checkpoint out/base_model is no checkpoint: it has no trainer_state.json; give a checkpoint-N",
    ),
    "format": ([], "out/checkpoint-6 has the format 0, this version reads 3"),
}


@pytest.mark.parametrize("what", OTHER)
def test_another_run_is_refused_and_told_apart(what, capsys, monkeypatch):
    train("dpo")
    options, message = OTHER[what]
    if what == "data":
        monkeypatch.setitem(ROWS[0], "chosen", "7")
    if what == "log":
        Path("out/metrics.jsonl").write_text(Path("out/metrics.jsonl").read_text().replace('"step": 2', '"step": 3'))
    if what == "no state":
        write_whole(Path("out/base_model"), lambda partial: (partial / "config.json").write_text("{}"))
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


@pytest.mark.parametrize("file", ["start/config.json", "adapter/adapter_config.json"])
def test_another_configuration_of_the_same_weights_is_refused(file, capsys):
    """Which is another model: the base of its positions, an adapter's scale. So are stored reference log-probs."""
    begun = ["--model_name_or_path", "start"]
    train("sft", "--max_steps", "1", output="start")
    train("sft", "--max_steps", "1", *LORA, *begun, output="adapter")
    begun += ["--adapter_name_or_path", "adapter", "--precompute_ref_log_probs"]
    train("dpo", *begun)
    known = Path(file).read_text()
    other = re.sub(r'"(rope_theta|lora_alpha)": (\d+)', r'"\1": 1\2', known)
    assert other != known
    Path(file).write_text(other)
    for stored in (True, False):
        if not stored:
            Path("out/ref_log_probs.safetensors").unlink()
        capsys.readouterr()
        train("dpo", *begun, *LATEST, status=1)
        said = capsys.readouterr().err
        assert ("holds reference log-probs for other configuration than this run's" in said) == stored
        assert stored or "with another configuration of its model or adapter (config.json, adapter_config.json)" in said
    Path(file).write_text(known)
    Path("out/ref_log_probs.safetensors").unlink()
    train("dpo", *begun, *LATEST)


def test_a_checkpoint_that_does_not_say_its_configuration_is_gone_on_with():
    """As those of before there was a fingerprint of it."""
    train("sft", *LORA)
    whole = log("out")
    back_to(3)
    state = Path("out/checkpoint-3/trainer_state.json")
    said = json.loads(state.read_text())
    del said["about"]["configured"]
    state.write_text(json.dumps(said))
    Path("out/checkpoint-3/manifest.json").unlink()
    write_manifest(state.parent)
    train("sft", *LORA, *LATEST)
    assert [row["hash"] for row in log("out")] == [row["hash"] for row in whole]


def test_other_versions_are_said(capsys, monkeypatch):
    train("sft")
    known = checkpoint.versions()
    monkeypatch.setattr(checkpoint, "versions", lambda: {**known, "torch": "9.9"})
    capsys.readouterr()
    train("sft", *LATEST)
    said = "other versions than when out/checkpoint-6 was written, so that bits may differ: torch 9.9 (was "
    assert said in " ".join(capsys.readouterr().out.split())
