"""Five files in the style of TRL's scripts, with spellings of every age, as they stand: parsed, trained, migrated."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from logratio.losses import DPOLoss, GRPOLoss, KTOLoss, ORPOLoss, SFTLoss
from logratio.trainers import cli, migrate
from logratio.trainers.config import DataConfig, ModelConfig, RolloutConfig, RunConfig, SaveConfig, TrainConfig
from logratio.trainers.options import parse_train

RECIPES = Path(__file__).parent / "recipes"
METHODS = ("sft", "dpo", "kto", "orpo", "grpo")
QWEN = "Qwen/Qwen2.5-0.5B"
BATCH = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
EXPECTED = {
    "sft": RunConfig(
        method="sft",
        loss=SFTLoss(),
        model=ModelConfig(model_name_or_path=QWEN),
        data=DataConfig(dataset_name=("trl-lib/Capybara",), max_length=1024),
        train=TrainConfig(
            **BATCH,
            output_dir="./sft_output",
            learning_rate=2e-5,
            num_train_epochs=1.0,
            warmup_steps=0.03,
            lr_scheduler_type="cosine",
            mixed_precision="fp16",
        ),
    ),
    "dpo": RunConfig(
        method="dpo",
        loss=DPOLoss(beta=0.1),
        model=ModelConfig(
            model_name_or_path=QWEN,
            dtype="bfloat16",
            gradient_checkpointing=True,
            lora_r=16,
            lora_alpha=32.0,
            lora_dropout=0.05,
            lora_target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
            load_in_4bit=True,
        ),
        data=DataConfig(dataset_name=("trl-lib/ultrafeedback_binarized",), dataset_test_split="test"),
        train=TrainConfig(
            **BATCH,
            output_dir="./dpo_output",
            learning_rate=5e-5,
            num_train_epochs=1.0,
            mixed_precision="bf16",
            optim="paged_adamw_8bit",
            eval_steps=0.25,
        ),
    ),
    "kto": RunConfig(
        method="kto",
        loss=KTOLoss(undesirable_weight=1.5),
        model=ModelConfig(model_name_or_path=QWEN),  # no use_peft: the whole model
        data=DataConfig(
            datasets=(
                '{"path": "thumbs.jsonl"}',
                '{"path": "more.jsonl", "columns": ["prompt", "completion", "label"]}',
            )
        ),
        train=TrainConfig(
            **BATCH,
            output_dir="./kto_output",
            learning_rate=5e-5,
            num_train_epochs=2.0,
            warmup_steps=0.1,
            mixed_precision="fp16",
        ),
        save=SaveConfig(save_steps=0.5, save_total_limit=1),
    ),
    "orpo": RunConfig(
        method="orpo",
        loss=ORPOLoss(beta=0.1),
        model=ModelConfig(model_name_or_path="Qwen/Qwen2-0.5B-Instruct"),
        data=DataConfig(dataset_name=("trl-lib/ultrafeedback_binarized",), dataset_test_split="test"),
        train=TrainConfig(
            **BATCH, output_dir="./orpo_output", learning_rate=5e-5, num_train_epochs=1.0, adam_beta2=0.95
        ),
    ),
    "grpo": RunConfig(
        method="grpo",
        loss=GRPOLoss(beta=0.04, max_completion_length=512),
        model=ModelConfig(model_name_or_path=QWEN),
        data=DataConfig(dataset_name=("trl-lib/DeepMath-103K",), shuffle=False),
        train=TrainConfig(
            **BATCH, output_dir="./grpo_output", learning_rate=5e-6, num_train_epochs=1.0, mixed_precision="fp16"
        ),
        rollout=RolloutConfig(
            num_generations=8,
            reward_funcs=("my_rewards:format_reward", "my_rewards:length_reward"),
            reward_weights=(1.0, 0.5),
        ),
    ),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A file's `env` is undone behind its test."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")


def recipe(method):
    return str(RECIPES / f"{method}.yaml")


@pytest.mark.parametrize("method", METHODS)
def test_it_becomes_the_run_that_it_means(method, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse_train([method, "--config", recipe(method)]) == EXPECTED[method]
    shown = capsys.readouterr().out
    assert shown.startswith(f"--config {recipe(method)}, judged by TRL 1.16's names\n")
    assert "refused" not in shown and "\x1b" not in shown


def test_a_files_variables_are_set_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    (tmp_path / "theirs.yaml").write_text("env: {TOKENIZERS_PARALLELISM: false}\nno_cuda: true\n")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    parse_train(["sft", "--config", str(tmp_path / "theirs.yaml")])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "False" and os.environ["ACCELERATE_USE_CPU"] == "true"
    (tmp_path / "ours.yaml").write_text("env: {TOKENIZERS_PARALLELISM: 1}\nlora_r: 4\n")
    capsys.readouterr()
    assert parse_train(["sft", "--config", str(tmp_path / "ours.yaml")]).model.lora_r == 4
    assert os.environ["TOKENIZERS_PARALLELISM"] == "1" and capsys.readouterr().out == ""


def test_another_process_than_the_first_shows_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    parse_train(["dpo", "--config", recipe("dpo")])
    assert capsys.readouterr().out == ""


def test_a_step_has_as_many_examples_as_in_trl():
    """2 x 4 rows or pairs; 2 x 4 completions are one prompt with its 8."""
    sizes = {method: EXPECTED[method].resolved(1).train.batch_size for method in METHODS}
    assert sizes == {"sft": 8, "dpo": 8, "kto": 8, "orpo": 8, "grpo": 1}


@pytest.mark.parametrize("method", METHODS)
def test_migrated_it_is_the_same_run_and_says_nothing_more(method, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    written = tmp_path / "ours.yaml"
    assert migrate.main([recipe(method), "--method", method, "--output", str(written)]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"written to {written}: logratio train {method} --config {written}\n")
    assert parse_train([method, "--config", str(written)]) == EXPECTED[method]
    assert capsys.readouterr().out == ""


ROWS = {
    "sft": {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]},
    "kto": {"prompt": "1+1=", "completion": "2"},
    "orpo": {
        "chosen": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}],
        "rejected": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "3"}],
    },
    "grpo": {"prompt": "1+1=", "solution": "2"},
}
REWARDS = """
def format_reward(completions, **kwargs):
    return [float("<answer>" in c) for c in completions]

def length_reward(completions, **kwargs):
    return [max(0.0, 1 - len(c) / 500) for c in completions]
"""
STAND_INS = {
    "kto": [],  # its datasets lie in the working directory
    "orpo": ["--dataset_name", "rows.jsonl", "--dataset_test_split", "train"],
    "grpo": ["--dataset_name", "rows.jsonl", "--max_completion_length", "4"],
}


@pytest.mark.parametrize("method", ROWS)
def test_it_trains_a_step_with_stand_ins(method, monkeypatch, request, tmp_path, capsys):
    """The file as it stands; the model and the data are said on the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = [{**ROWS[method], **({"label": i % 2 == 0} if method == "kto" else {})} for i in range(8)]
    for name in ("rows.jsonl", "thumbs.jsonl", "more.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    request.addfinalizer(lambda: sys.modules.pop("my_rewards", None))  # or the next of that name would be this one
    words = STAND_INS.get(method, ["--dataset_name", "rows.jsonl"])
    words = ["train", method, "--config", recipe(method), "--model_name_or_path", "tiny", "--max_steps", "1", *words]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    without = "without effect: fp16: true (autocast to float16 needs a GPU, and there is none: without autocast)"
    assert (without in shown) == (method != "orpo")
    assert shown.index("judged by TRL") < shown.index("step 1/")
    folder = tmp_path / f"{method}_output"
    (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(row["loss"]) and (folder / "config.json").exists()  # the whole model: nothing says use_peft
    assert ("eval_loss" in row) == (method == "orpo")
