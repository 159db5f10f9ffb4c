"""data_card.json of a run: what became of the rows, as the report counted it, and how long they are."""

import json
from pathlib import Path

import pytest

from logratio.trainers.cli import main
from logratio.trainers.logs import runlog

GOOD = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
LONG = {"prompt": "1+1=", "chosen": "2" * 40, "rejected": "3"}
SAME = {"prompt": "1+2=", "chosen": "3", "rejected": "3"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(method, rows, *options, output="out"):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", method, "--dataset_name", "rows.jsonl", "--max_steps", "2", "--batch_size", "2", "--lora_r", "2"]
    assert main([*words, "--output_dir", output, *options]) == 0
    return json.loads(Path(output, "data_card.json").read_text())


def test_every_count_is_kept_and_the_lengths_are_those_of_the_examples():
    """The tokenizer is of bytes: 4 tokens of a prompt, a byte and EOS of a completion; 20 - 4 left of the long one."""
    card = train("dpo", [GOOD, LONG, SAME, {**GOOD, "chosen": ""}], "--max_length", "20", "--on_bad_row", "skip")
    (one,) = card["train"]["sets"]
    assert one == {
        "name": "rows.jsonl", "rows": 4, "examples": 3, "truncated": 1, "tokens_cut": 41 - 16, "dropped": 0,
        "identical": 1, "moved": 0, "weighted": 0, "begun": 0, "special": 0, "labels": None, "skipped": 1,
        "skipped_reasons": "1 x 'chosen' has no text to learn from",
    }  # fmt: skip
    assert (card["train"]["examples"], card["train"]["epoch_size"], card["train"]["streamed"]) == (3, 3, False)
    assert card["train"]["prompt_tokens"] == 4
    assert card["train"]["completion_tokens"] == (2 + 2 + 16 + 2 + 2 + 2) / 6
    assert "evaluation" not in card


def test_what_is_evaluated_on_stands_beside_what_is_trained_on():
    card = train("dpo", [GOOD] * 6, "--eval_size", "2")
    assert (card["train"]["examples"], card["evaluation"]["examples"]) == (4, 2)
    assert (card["train"]["sets"][0]["examples"], card["evaluation"]["sets"]) == (6, [])


def test_of_prompts_no_completion_is_counted():
    card = train("grpo", [{"prompt": "1+1=", "answer": "2"}] * 4, "--max_completion_length", "3")
    assert (card["train"]["prompt_tokens"], card["train"]["completion_tokens"]) == (4, None)


def test_of_a_stream_what_was_read_is_known_at_the_end():
    card = train("dpo", [GOOD, LONG] * 3, "--streaming", "--max_length", "20")
    assert card["train"]["streamed"] and card["train"]["examples"] is None and card["train"]["epoch_size"] == 4
    (one,) = card["train"]["sets"]
    assert (one["rows"], one["examples"], one["truncated"]) == (None, 6, 3)


def test_a_new_run_in_the_folder_moves_it_aside_and_a_full_disk_costs_no_run(monkeypatch, capsys):
    train("dpo", [GOOD] * 4)
    train("dpo", [GOOD] * 2, "--overwrite_output_dir")
    assert json.loads(Path("out/data_card.1.json").read_text())["train"]["examples"] == 4

    def full(self, *args):
        raise OSError(28, "No space left on device")

    log = runlog.RunLog("other", {}, total_steps=1)
    monkeypatch.setattr(runlog.Path, "replace", full)
    log.keep_card({})
    assert "other/data_card.json could not be written: No space left on device" in capsys.readouterr().out
    assert {p.name for p in Path("other").iterdir()} == {"metrics.jsonl", "run_config.json"}
