"""A share of the run, where a number of steps could stand, comes to the same steps."""

import json

import pytest

from logratio.trainers.cli import main
from logratio.trainers.options import parse_train
from logratio.trainers.preflight import copies_of_weights


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{i}+1=", "completion": "2"}) for i in range(8))
    )
    return tmp_path


def test_evaluations_checkpoints_and_warm_up_come_at_their_shares(rows):
    """Of 5 steps: every 0.4 x 5 = 2, and a warm-up of 0.3 x 5 = 1.5, which is rounded up to 2."""
    words = ["train", "sft", "--dataset_name", "rows.jsonl", "--lora_r", "2", "--batch_size", "2", "--max_steps", "5"]
    shares = ["--eval_size", "0.25", "--eval_steps", "0.4", "--save_steps", "0.4", "--warmup_steps", "0.3"]
    numbers = ["--eval_size", "2", "--eval_steps", "2", "--save_steps", "2", "--warmup_steps", "2"]
    logs = []
    for folder, options in (("shares", shares), ("numbers", numbers)):
        assert main([*words, *options, "--learning_rate", "0.01", "--output_dir", folder]) == 0
        lines = [json.loads(line) for line in (rows / folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 5]
        assert sorted(path.name for path in (rows / folder).glob("checkpoint-*")) == [
            f"checkpoint-{n}" for n in (2, 4, 5)
        ]
        logs.append([(line["loss"], line["learning_rate"], line.get("eval_loss")) for line in lines])
    assert logs[0] == logs[1]
    assert [rate for _, rate, _ in logs[0]] == pytest.approx([0, 0.005, 0.01, 0.01 * 2 / 3, 0.01 / 3])
    again = ["--resume_from_checkpoint", "latest", "--output_dir", "shares"]
    assert main([*words, *shares, "--learning_rate", "0.01", *again]) == 0


def test_the_disk_is_asked_for_as_many_checkpoints():
    for steps in ("0.25", "10"):  # of 40 steps four, each with two moments beside the weights
        assert copies_of_weights(parse_train(["sft", "--save_steps", steps]), 40) == 1 + 3 * 4
