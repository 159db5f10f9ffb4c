"""What is learned of a row where that is neither `prompt` and `completion` nor messages: `formatting_func` of the
trainer, `dataset_text_field` of its options."""

import json
from pathlib import Path

import datasets
import pytest
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer

from logratio.trainers import SFTConfig, SFTTrainer, UserError, cli

from ._rows import PLAIN, assert_same, trained

ROWS = [
    {"prompt": f"{n} + 1", "completion": f"= {n + 1}", "text": "not this", "body": f"What {n} is."} for n in range(8)
]


def joined(row):
    return f"{row['prompt']} {row['completion']}"


def texts(of):
    return [{"text": of(row)} for row in ROWS]


def train(data, output, evaluation=None, formatting_func=None, **options):
    args = SFTConfig(output, **PLAIN | options)
    trainer = SFTTrainer("model", args, train_dataset=data, eval_dataset=evaluation, formatting_func=formatting_func)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_rows_are_what_the_function_makes_of_them(kind, here):
    train(kind(ROWS), "made", formatting_func=joined)
    train(texts(joined), "texts")
    assert_same(trained("made"), trained("texts"))


def test_a_column_is_the_text_whatever_else_a_row_has(here):
    train(ROWS, "named", dataset_text_field="body")
    train(texts(lambda row: row["body"]), "texts")
    assert_same(trained("named"), trained("texts"))


@pytest.mark.parametrize("way", ["formatting_func", "dataset_text_field"])
def test_the_loss_is_trl_s(way, here):
    """Of rows that have the columns beside the text that TRL would not take for it either."""
    data = datasets.Dataset.from_list([{"question": row["prompt"], "body": row["body"]} for row in ROWS])
    given = {"formatting_func": lambda row: row["question"] + row["body"]} if way == "formatting_func" else {}
    named = {"dataset_text_field": "body"} if way == "dataset_text_field" else {}
    ours = train(data, "ours", **given, **named)
    shared = {"max_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "linear", "save_strategy": "no"}
    args = trl.SFTConfig(
        "theirs", per_device_train_batch_size=8, use_cpu=True, bf16=False, report_to="none", **shared, **named
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
    theirs = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, **given)
    theirs.train()
    ours = train(data, "all", **given, **named, batch_size=8, lr_scheduler_type="linear")
    wanted = theirs.state.log_history[-1]["train_loss"]
    assert sum(row["loss"] for row in ours.state.log_history) / 3 == pytest.approx(wanted, rel=1e-5)


def test_the_evaluation_s_rows_are_made_too(here):
    trainer = train(ROWS[:6], "made", evaluation=ROWS[6:], formatting_func=joined)
    plain = train(texts(joined)[:6], "texts", evaluation=texts(joined)[6:])
    assert trainer.state.log_history[-1]["eval_loss"] == plain.state.log_history[-1]["eval_loss"]


def test_a_function_of_many_rows_is_refused(here):
    with pytest.raises(UserError) as raised:
        train(ROWS, "out", formatting_func=lambda row: [row["body"]])
    assert str(raised.value) == (
        "formatting_func= must return the text of the one row that it is given, and returned list ['What 0 is.'] for "
        "row 0"
    )
    with pytest.raises(UserError, match=r"^formatting_func= is of rows: give a train_dataset= of them, not a name$"):
        train("arithmetic", "out", formatting_func=joined)


def write(rows, name="rows.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


SHORT = ["--dataset_name", "rows.jsonl", "--max_steps", "1", "--batch_size", "4", "--output_dir", "out"]


def test_a_row_without_the_column_is_named(here, capsys):
    write([*ROWS[:2], {"text": "a"}])
    assert cli.main(["train", "sft", *SHORT, "--dataset_text_field", "body"]) == 1
    said = "rows.jsonl, line 3 has no column 'body' (--dataset_text_field), it has text"
    assert capsys.readouterr().err.startswith(f"logratio: {said}")
    assert cli.main(["train", "sft", *SHORT, "--dataset_text_field", "body", "--on_bad_row", "skip"]) == 0
    (skipped,) = map(json.loads, Path("out/skipped_rows.jsonl").read_text().splitlines())
    assert "has no column 'body'" in skipped["reason"]
    streamed = ["--streaming", "--overwrite_output_dir"]
    assert cli.main(["train", "sft", *SHORT, *streamed, "--dataset_text_field", "body"]) == 1
    assert "has no column 'body' (--dataset_text_field), it has text" in capsys.readouterr().err


def test_the_table_of_another_column_is_another(here):
    """Though the rows are the same file's."""
    write(ROWS)
    for field in ("body", "completion"):
        words = [*SHORT, "--batch_size", "8", "--overwrite_output_dir", "--dataset_text_field", field]
        assert cli.main(["train", "sft", *words]) == 0
        tokens = sum(len(row[field]) + 1 for row in ROWS)  # a byte is one, and EOS
        assert json.loads(Path("out/metrics.jsonl").read_text())["num_tokens"] == tokens


def test_eval_reads_the_run_s_column(here, capsys):
    write(ROWS, "train.jsonl")
    write(ROWS, "test.jsonl")
    words = ["--dataset_name", ".", "--dataset_test_split", "test", "--max_steps", "1", "--output_dir", "out"]
    assert cli.main(["train", "sft", *words, "--dataset_text_field", "body"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "out", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    trained_on = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])
    assert told["nll"] == pytest.approx(trained_on["eval_nll"], rel=1e-6)


def test_methods_that_learn_no_texts_refuse_it(capsys, here):
    assert cli.main(["train", "dpo", "--dataset_text_field", "body"]) == 1
    assert capsys.readouterr().err == (
        "logratio: --dataset_text_field body is of texts that sft learns whole, and this is dpo; leave it out\n"
    )
