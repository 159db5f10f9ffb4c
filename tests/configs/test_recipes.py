"""configs/recipes: each file as it stands becomes the run that it says, fits a card of 24 GB, and trains on a small
model in the place of the hub's and rows of the same columns."""

import json
import math
from pathlib import Path

import pytest

from logratio.benchmarks.documents import RECIPES, WAYS, recipe
from logratio.trainers import cli
from logratio.trainers.options import parse_train
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer
from logratio.trainers.rollout.text_rewards import format_reward, length_reward

FOLDER = Path(__file__).parents[2] / "configs" / "recipes"
EACH = [(method, way) for method in RECIPES for way in WAYS]
QUICK = {("sft", "full"), ("dpo", "qlora"), ("grpo", "lora")}


def turn(role, text):
    return {"role": role, "content": text}


def pair(n):
    first = turn("user", f"{n}+{n}=")
    rejected = [first, turn("assistant", str(2 * n + 1))]
    return {
        "chosen": [first, turn("assistant", str(2 * n))],
        "rejected": rejected,
        "score_chosen": 9.0,
        "score_rejected": 2.0,
    }


STAND_INS = {
    "trl-lib/Capybara": [
        {"messages": [turn("user", f"{n}+1="), turn("assistant", str(n + 1))], "source": "made up", "num_turns": 1}
        for n in range(16)
    ],
    "trl-lib/ultrafeedback_binarized": [pair(n) for n in range(16)],
    "trl-lib/kto-mix-14k": [
        {"prompt": [turn("user", f"{n}+2=")], "completion": [turn("assistant", str(n + 2))], "label": n % 2 == 0}
        for n in range(16)
    ],
    "trl-lib/DeepMath-103K": [{"prompt": [turn("user", f"{n}+2=")], "solution": f"${n + 2}$"} for n in range(16)],
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Folders in the working directory that are called as the hub's model and data sets."""
    tiny_model(0).save_pretrained(tmp_path / "Qwen/Qwen2.5-0.5B")
    tiny_tokenizer().save_pretrained(tmp_path / "Qwen/Qwen2.5-0.5B")
    for name, rows in STAND_INS.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(method, way):
    return parse_train([method, "--config", str(FOLDER / method / f"{way}.yaml")])


def test_every_file_is_one_of_them():
    found = {(path.parent.name, path.stem) for path in FOLDER.glob("*/*")}
    assert found == set(EACH)


@pytest.mark.parametrize("method, way", EACH)
def test_it_becomes_the_run_that_it_says(method, way, capsys):
    run = parsed(method, way)
    model = run.model
    assert capsys.readouterr().out == ""  # options of ours, judged by nobody
    assert (run.method, run.train.output_dir) == (method, f"runs/{method}-{way}")
    adapters = (model.lora_r, model.lora_alpha, model.lora_dropout)
    assert adapters == ((0, None, None) if way == "full" else (16, 32, 0.05))
    assert (model.load_in_4bit, model.lora_target_modules) == (way == "qlora", None)
    assert (model.dtype, run.train.mixed_precision) == (("float32", "bf16") if way == "full" else ("bfloat16", "no"))
    assert run.resolved(1).train.batch_size == (1 if method == "grpo" else 8) and run.data.max_length == 1024
    own = {"full": 1e-6, "lora": 5e-5, "qlora": 5e-5}[way]
    expected = {"sft": 2e-5 if way == "full" else 2e-4, "grpo": 1e-6 if way == "full" else 5e-6}.get(method, own)
    assert run.train.learning_rate == expected
    (first, *_) = (FOLDER / method / f"{way}.yaml").read_text().splitlines()
    assert first == f"# logratio train {method} --config configs/recipes/{method}/{way}.yaml"


@pytest.mark.parametrize("method, way", EACH)
def test_it_fits_a_card_of_24_gb(method, way):
    """With error correction, which takes a sixteenth."""
    told = recipe(FOLDER, method, way, "L4")
    assert told["fits"] and told["method"] == method and told["model"] == "Qwen/Qwen2.5-0.5B"
    assert (told["trained_parameters"] == told["parameters"]) == (way == "full")


def trains(method, way, hub):
    words = ["train", method, "--config", str(FOLDER / method / f"{way}.yaml"), "--max_steps", "2"]
    assert cli.main(words + (["--max_completion_length", "8"] if method == "grpo" else [])) == 0
    folder = hub / "runs" / f"{method}-{way}"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(math.isfinite(row["loss"]) for row in rows)
    trained = "model.safetensors" if way == "full" else "adapter_model.safetensors"
    assert (folder / trained).exists()
    if method == "grpo":
        assert rows[0]["rewards/format_reward/mean"] == 0 and 0.9 < rows[0]["rewards/length_reward/mean"] <= 1


@pytest.mark.parametrize("method, way", sorted(QUICK))
def test_it_trains_on_stand_ins(method, way, hub):
    trains(method, way, hub)


@pytest.mark.slow
@pytest.mark.parametrize("method, way", sorted(set(EACH) - QUICK))
def test_the_others_train_too(method, way, hub):
    trains(method, way, hub)


def test_the_rewards_take_text_and_messages_alike():
    texts = ["", "<answer>4</answer>", "<answer>\n4\n</answer> " + "a" * 478, "b" * 600]
    messages = [[turn("assistant", text)] for text in texts]
    assert format_reward(completions=texts, prompts=texts) == format_reward(completions=messages) == [0, 1, 1, 0]
    lengths = [1.0, 1 - 18 / 500, 1 - 499 / 500, 0.0]
    assert length_reward(completions=texts) == length_reward(completions=messages) == pytest.approx(lengths)
