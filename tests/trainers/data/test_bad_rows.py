"""Rows that cannot be used, skipped: what is left keeps its place, and every one that is not is counted and listed."""

import json

import pytest

from logratio.losses import Kind
from logratio.trainers.cli import main
from logratio.trainers.data.examples import Rows, load_rows, prepare, prepare_prompts
from logratio.trainers.errors import RowError, UserError
from logratio.trainers.policy.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}


def skipping(rows, kind, tokenizer=TOKENIZER, **options):
    return prepare(
        rows if isinstance(rows, Rows) else Rows("data", rows), kind, tokenizer, on_bad_row="skip", **options
    )


def test_what_is_left_keeps_its_rows_and_what_is_not_is_counted_by_reason():
    rows = [GOOD, {**GOOD, "chosen": 3}, GOOD, {**GOOD, "chosen": 4.5}, {**GOOD, "rejected": " "}, GOOD]
    examples, report = skipping(rows, Kind.PAIRED)
    assert [example.row for example in examples] == [0, 2, 5]
    assert str(report) == (
        "data: 3 examples; 3 rows skipped (2 x 'chosen' must be text or a list of messages, and the same in all rows, "
        "1 x 'rejected' has no text to learn from)"
    )
    assert report.skipped[2] == {
        "data": "data",
        "row": 4,
        "reason": "'rejected' has no text to learn from: fill it in or remove the row",
    }
    assert report.skipped[0]["reason"].endswith("got int 3")
    with pytest.raises(RowError, match=r"row 1 .*'chosen' must be text") as caught:
        prepare(Rows("data", rows), Kind.PAIRED, TOKENIZER)
    assert (caught.value.row, caught.value.place) == (1, "data, row 1 (counted from 0)")


def test_only_the_most_frequent_reasons_are_spelled_out():
    bad = [{**GOOD, "chosen": None}, {**GOOD, "chosen": ""}, {**GOOD, "prompt": 1}, {**GOOD, "rejected": None}]
    _, report = skipping([GOOD, *bad, bad[3]], Kind.PAIRED)
    assert "5 rows skipped (2 x lacks 'rejected', which the first row has, 1 x " in str(report)
    assert str(report).endswith(", 1 for other reasons)")


def test_pairs_for_a_labeled_method_are_skipped_whole():
    whole = {"prompt": "q", "chosen": "cccccc", "rejected": "dddddd"}
    empty = {"prompt": "", "chosen": "cc", "rejected": "dd"}
    examples, report = skipping([whole, {**whole, "rejected": ""}, whole], Kind.LABELED, max_length=4)
    assert [(example.row, example.label) for example in examples] == [(0, True), (2, True), (0, False), (2, False)]
    assert (report.labels, report.truncated, report.tokens_cut) == ((2, 2), 4, 4 * 4)
    examples, _ = skipping([empty], Kind.LABELED)
    assert [example.label for example in examples] == [True, False]


class Choosy:
    """A tokenizer that fails at some texts, as one whose template refuses them does, and counts its calls."""

    def __init__(self, place):
        self.place, self.calls = place, 0

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)

    def __call__(self, texts, **options):
        self.calls += 1
        for text in texts:
            if "wrong" in text:
                raise UserError(f"{self.place}: the text is wrong")
        return TOKENIZER(texts, **options)


def test_a_row_that_fails_in_the_tokenizer_is_found_in_its_batch():
    """What one part of a row had counted before the other failed is not counted."""
    rows = [GOOD, {**GOOD, "chosen": "a" * 9, "rejected": "wrong"}, GOOD]
    examples, report = skipping(rows, Kind.LABELED, Choosy("data, row 1 (counted from 0)"), max_length=5)
    assert [(e.row, e.label) for e in examples] == [(0, True), (2, True), (0, False), (2, False)]
    assert (report.truncated, report.skipped[0]["reason"]) == (0, "the text is wrong")


def test_an_error_is_of_the_row_whose_place_begins_it():
    own = RowError.of(UserError("f.jsonl, line 1: 'label' is odd"), "f.jsonl, line 1", 0)
    assert (str(own), own.reason, own.row) == ("f.jsonl, line 1: 'label' is odd", "'label' is odd", 0)
    assert RowError.of(own, "elsewhere", 3) is own
    for other in ("f.jsonl, line 12 lacks 'label'", "f.jsonl has no rows", ""):
        assert RowError.of(UserError(other), "f.jsonl, line 1", 0) is None


@pytest.mark.parametrize("place", ["the tokenizer", "data, row 11 (counted from 0)", "data, row 1"])
def test_an_error_of_the_whole_data_set_ends_the_run_all_the_same(place):
    with pytest.raises(UserError, match=f"{place}: the text is wrong".replace("(", r"\(").replace(")", r"\)")):
        skipping([GOOD, {**GOOD, "chosen": "wrong"}], Kind.PAIRED, Choosy(place))
    with pytest.raises(UserError, match="row 0 .* has the columns question, expected prompt and chosen"):
        skipping([{"question": "q"}] * 3, Kind.PAIRED)
    with pytest.raises(UserError, match="completion_only_loss needs the columns prompt and completion"):
        skipping([{"text": "a"}], Kind.SEQUENCE, completion_only_loss=True)


def test_the_first_row_that_has_the_columns_says_which_they_are():
    rows = [{"chosen": "a"}, {"prompt": 3, "chosen": "a", "rejected": "b"}, GOOD, {**GOOD, "prompt": []}]
    examples, report = skipping(rows, Kind.PAIRED)
    assert [e.row for e in examples] == [2] and [entry["row"] for entry in report.skipped] == [0, 1, 3]


def test_nothing_left_is_one_sentence_that_says_why():
    with pytest.raises(UserError, match="^data: none of its 2 rows can be used: 2 x 'completion' has no text to learn"):
        skipping([{"prompt": "q", "completion": " "}] * 2, Kind.SEQUENCE)
    with pytest.raises(UserError, match="^data: its only row cannot be used: 1 x the prompt has no tokens"):
        prepare_prompts(Rows("data", [{"prompt": ""}]), TOKENIZER, on_bad_row="skip")


def test_prompts_keep_their_rows_too():
    rows = Rows("data", [{"prompt": "q", "answer": 1}, {"prompt": "q"}, {"prompt": ""}, {"prompt": "p", "answer": 2}])
    prompts, report = prepare_prompts(rows, TOKENIZER, on_bad_row="skip")
    assert [(p.row, p.columns) for p in prompts] == [(0, {"answer": 1}), (3, {"answer": 2})]
    assert [entry["row"] for entry in report.skipped] == [1, 2]


def test_lines_that_are_no_json_are_skipped_and_named_by_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{json.dumps(GOOD)}\n\n{{"prompt": \n{json.dumps({**GOOD, "label": 1})}\n')
    examples, report = skipping(load_rows(str(path), Kind.PAIRED, check=False), Kind.PAIRED)
    assert [example.row for example in examples] == [0, 2]
    reason = "column 12 is not valid JSON: Expecting value"
    assert report.skipped == [{"data": str(path), "row": 1, "line": 3, "reason": reason}]


def test_a_run_lists_what_it_skipped_beside_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(GOOD), '{"prompt"', json.dumps({**GOOD, "rejected": "ß"}), json.dumps({**GOOD, "chosen": ""})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    words = ["train", "dpo", "--dataset_name", "rows.jsonl", "--max_steps", "1", "--output_dir", "out", "--lora_r", "2"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("logratio: rows.jsonl, line 2, column 10 is not valid JSON: ")
    assert error.endswith(
        "; 1 of the 2 rows behind it cannot be used either (line 4: 1 x 'chosen' has no text to learn from): mend them "
        "all, or leave such rows out with --on_bad_row skip\n"
    )
    assert not (tmp_path / "out").exists()
    assert main([*words, "--on_bad_row", "skip", "--eval_size", "1"]) == 0
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [(entry["data"], entry["row"], entry["line"]) for entry in listed] == [
        ("rows.jsonl", 1, 2),
        ("rows.jsonl", 3, 4),
    ]
    shown = capsys.readouterr().out
    assert "rows.jsonl: 2 examples; 2 rows skipped (1 x column N is not valid JSON, 1 x 'chosen' has no text" in shown
    assert "skipped rows are listed in out/skipped_rows.jsonl" in shown and "1 left to train on" in shown
    (tmp_path / "rows.jsonl").write_text(lines[0])
    assert main([*words, "--on_bad_row", "skip", "--overwrite_output_dir"]) == 0
    assert {p.name for p in (tmp_path / "out").glob("skipped*")} == {"skipped_rows.1.jsonl"}
