"""Short runs in a folder of their own, and what they leave behind."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from logratio.trainers import cli
from logratio.trainers.checkpoints.folder import checkpoints_in
from logratio.trainers.logs.journal import read_chain

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
LATEST = ["--resume_from_checkpoint", "latest"]


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


def completions(folder):
    """What a run has sampled, as one reads it."""
    path = Path(folder, "completions.parquet")
    return pq.read_table(path).to_pylist() if path.exists() else None


def notes(folder, kind=None):
    """(step, text) of what a run has said; kind: note, alarm or end."""
    path = Path(folder, "notes.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["step"], line["text"]) for line in lines if kind in (None, line["kind"])]


def assert_same(one, other):
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert log(one)[-1]["hash"] == log(other)[-1]["hash"]
    assert [row["step"] for row in log(other)] == list(range(1, 7))
    assert completions(one) == completions(other)
    assert notes(one, "alarm") == notes(other, "alarm")


def back_to(step, folder="out"):
    """As if the run had been killed behind its checkpoint of this step: what came later is not there."""
    for later, path in checkpoints_in(Path(folder)):
        if later > step:
            shutil.rmtree(path)
    for path in Path(folder).glob("*model*.safetensors"):
        path.unlink()
