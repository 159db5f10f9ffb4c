"""`logratio compare` as a user calls it: what it runs, leaves and says, and that it goes on where it was cut."""

import json
import multiprocessing
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from logratio.benchmarks.comparing import command, running
from logratio.benchmarks.comparing.command import LINES, PAGE, VERDICTS, main
from logratio.benchmarks.comparing.rows import as_kind, material, ordered
from logratio.losses import Kind
from logratio.trainers.errors import UserError

from ..pages._chromium import browser, chromium

SMALL = [
    "--max_steps",
    "2",
    "--checks",
    "1",
    "--eval_rows",
    "6",
    "--samples",
    "2",
    "--start_steps",
    "2",
    "--seeds",
    "2",
]
THREE = ["sft", "<b>a</b>=dpo --beta 0.5", "b=dpo --beta 0.5"]


def compare(folder: Path, *words: str) -> int:
    return main([*words, *SMALL, "--batch_size", "4", "--learning_rate", "1e-3", "--output_dir", str(folder)])


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LINES).read_text().splitlines()]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder with two contestants that are one, under two names, and another loss."""
    folder = tmp_path_factory.mktemp("compared")
    assert compare(folder, *THREE) == 0
    return folder


def test_each_contestant_has_a_line_for_each_seed(compared):
    found = lines(compared)
    assert [(x["contestant"], x["seed"]) for x in found] == [
        (name, seed) for seed in (0, 1) for name in ("sft", "<b>a</b>", "b")
    ]
    for line in found:
        assert line["status"] == "ok" and line["steps"] == 2 and line["num_tokens"] > 0
        assert [point["steps"] for point in line["curve"]] == [0, 2]
        assert set(line["rows"]) == {"reward", "greedy", "exact", "accuracy", "nll", "kl", "length"}
        assert all(len(values) == 6 for values in line["rows"].values())
        begun = line["curve"][0]
        assert begun["kl"] == 0 and begun["accuracy"] == 0.5, "it starts as the start"
        for name, values in line["rows"].items():
            assert line["curve"][-1][name] == pytest.approx(sum(values) / 6, abs=1e-5)


def test_all_start_alike(compared):
    starts = [line["curve"][0] for line in lines(compared)]
    assert all(start == starts[0] for start in starts)


def test_contestants_that_are_the_same_differ_by_exactly_nothing(compared):
    found = [json.loads(line) for line in (compared / VERDICTS).read_text().splitlines()]
    alike = [x for x in found if {x["first"], x["second"]} == {"<b>a</b>", "b"}]
    assert len(alike) == 7 and len(found) == 21
    for one in alike:
        assert one["difference"] == one["low"] == one["high"] == 0 and one["verdict"] == "no difference seen"
    assert any(x["difference"] for x in found if "sft" in (x["first"], x["second"]))


def test_what_has_its_line_is_not_run_again(compared, monkeypatch, capsys):
    whole = (compared / LINES).read_text()
    kept = whole.splitlines(keepends=True)
    (compared / LINES).write_text("".join(kept[:4]) + kept[4][:50])  # cut in the middle of a line
    ran = []
    real = command.run_job
    monkeypatch.setattr(command, "run_job", lambda job: ran.append((job.contestant, job.seed)) or real(job))
    assert compare(compared, *THREE) == 0
    assert ran == [("<b>a</b>", 1), ("b", 1)]
    said = capsys.readouterr().out
    assert "4 runs of 6 have their line already" in said and "SFT of the embedded model" not in said
    assert [x["rows"] for x in lines(compared)] == [json.loads(line)["rows"] for line in kept], "to the last digit"


def test_another_budget_is_another_comparison(compared, monkeypatch):
    ran = []
    monkeypatch.setattr(
        command, "run_job", lambda job: ran.append(job.contestant) or {"status": "failed", "error": "no"}
    )
    before = (compared / LINES).read_text()
    main([*THREE, *SMALL, "--batch_size", "4", "--learning_rate", "2e-3", "--output_dir", str(compared)])
    assert len(ran) == 6
    (compared / LINES).write_text(before)


def test_a_run_that_fails_is_told_and_the_others_compared(compared, monkeypatch, capsys):
    real = command.run_job

    def failing(job):
        return {"status": "failed", "error": "the loss is not finite"} if job.contestant == "b" else real(job)

    monkeypatch.setattr(command, "run_job", failing)
    kept = [line for line in (compared / LINES).read_text().splitlines(keepends=True) if '"b"' not in line[:80]]
    (compared / LINES).write_text("".join(kept))
    assert compare(compared, *THREE) == 1
    assert "b with seed 0 failed: the loss is not finite" in capsys.readouterr().out
    verdicts = [json.loads(line) for line in (compared / VERDICTS).read_text().splitlines()]
    assert {(x["first"], x["second"]) for x in verdicts} == {("sft", "<b>a</b>")}
    monkeypatch.setattr(command, "run_job", real)
    assert compare(compared, *THREE) == 0, "what failed is tried again"


def test_a_loss_of_ones_own_that_raises_is_a_run_that_failed(monkeypatch, capsys):
    def raising(job):
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(running, "trained", raising)
    job = SimpleNamespace(threads=None)
    assert running.run_job(job) == {"status": "failed", "error": "ZeroDivisionError: of all things"}
    assert "in raising" in capsys.readouterr().err, "with its traceback"


def test_the_page_is_whole_and_escapes_what_is_the_users(compared):
    page = (compared / PAGE).read_text()
    for part in ("Which is better", "Differences in reward", "reward against KL", "no difference seen", "sft"):
        assert part in page
    assert "<b>a</b>" not in page and "&lt;b&gt;a&lt;/b&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.skipif(browser() is None, reason="needs Chromium or Chrome")
def test_the_page_fits_narrow_and_wide_light_and_dark(compared):
    overflow = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') &&
      e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName)"""
    with chromium() as tab:
        for width, dark in ((390, False), (390, True), (1440, False), (1440, True)):
            tab.open(compared / PAGE, width, dark=dark)
            assert tab.value("document.documentElement.scrollWidth") == width
            assert tab.value(overflow) == [] and tab.errors == []


@pytest.mark.slow
def test_a_process_for_each_run_gives_the_same_lines(compared, tmp_path):
    assert compare(tmp_path, *THREE, "--isolate", "2") == 0
    alone = {(x["contestant"], x["seed"]): x["rows"] for x in lines(tmp_path)}
    assert alone == {(x["contestant"], x["seed"]): x["rows"] for x in lines(compared)}


def test_a_process_that_is_ended_from_outside_is_said(monkeypatch):
    """As by the system, where memory runs out."""
    monkeypatch.setattr(command, "run_job", signal.raise_signal)
    with pytest.raises(UserError, match="ended from outside, .* the same command goes on with the runs that have no"):
        list(command.ended([(signal.SIGKILL, {})], isolate=1))


@pytest.mark.slow
def test_an_interrupt_waits_for_no_run(monkeypatch):
    monkeypatch.setattr(command, "run_job", time.sleep)
    under_way = command.ended([(0, {}), (600, {}), (600, {})], isolate=2)
    assert next(under_way) == ((0, {}), None)
    under_way.close()
    for child in multiprocessing.active_children():
        child.join(60)
    assert not multiprocessing.active_children()


def test_the_budget_in_tokens_ends_at_the_first_step_that_reaches_it():
    spent = running.Budget("tokens", 100)
    assert [spent.spent({"step": 3, "num_tokens": tokens}, 9.0) for tokens in (99, 100)] == [99, 100]
    assert running.Budget("seconds", 5).spent({"step": 3, "num_tokens": 1}, 4.5) == 4.5
    assert str(spent) == "100 tokens" and str(running.Budget("seconds", 2.5)) == "2.5 seconds"


def test_all_learn_from_the_same_pairs_in_the_same_order():
    data = material("shopping", "train", None, 5)
    in_order = ordered(data.train, 1)
    assert in_order != data.train and ordered(data.train, 2) != in_order == ordered(data.train, 1)
    prompts = [row["prompt"] for row in in_order[:8]]
    for kind, each in ((Kind.SEQUENCE, 1), (Kind.PAIRED, 1), (Kind.LABELED, 2), (Kind.LISTED, 1), (Kind.GROUPED, 1)):
        rows = as_kind(in_order, kind)
        assert [row["prompt"] for row in rows[: 8 * each : each]] == prompts
    assert as_kind(in_order, Kind.SEQUENCE)[0]["completion"] == in_order[0]["chosen"]
    listed = as_kind(in_order, Kind.LISTED)[0]
    assert listed["completions"] == [in_order[0]["chosen"], in_order[0]["rejected"]] and listed["rewards"] == [1, 0]
    assert set(as_kind(in_order, Kind.GROUPED)[0]) == {"prompt", "answer"}, "what is right is not in it"


ROWS = [
    ([{"prompt": "1=", "chosen": "a"}] * 9, "has no 'rejected': contestants are compared on pairs, with the columns"),
    ([{"prompt": "1=", "chosen": "a", "rejected": "b"}] * 5, "has 5 rows, of which --eval_rows 6 leaves too few"),
]


@pytest.mark.parametrize(("rows", "message"), ROWS)
def test_rows_that_cannot_be_compared_on_are_said(tmp_path, rows, message):
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=re.escape(message)):
        main([*THREE, *SMALL, "--dataset_name", str(tmp_path / "mine.jsonl"), "--output_dir", str(tmp_path)])


MORE = [
    (["--baseline", "c"], "--baseline c: no contestant is called so (sft, <b>a</b>, b)"),
    (["--max_tokens", "9", "--lr_scheduler_type", "linear"], "--lr_scheduler_type linear needs to know the last step"),
]


@pytest.mark.parametrize(("words", "message"), MORE)
def test_what_does_not_fit_together_is_said(tmp_path, words, message):
    small = SMALL[2:] if "--max_tokens" in words else SMALL
    with pytest.raises(UserError, match=re.escape(message)):
        main([*THREE, *small, *words, "--output_dir", str(tmp_path)])


def test_a_place_that_cannot_be_written_to_is_said(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"^--output_dir \S+file is no folder that can be written to \(File exists\)$"):
        compare(tmp_path / "file", *THREE)
    (tmp_path / PAGE).write_text("mine")
    message = rf"{PAGE} was not made by `logratio compare`, and is not overwritten: choose another --output_dir$"
    with pytest.raises(UserError, match=message):
        compare(tmp_path, *THREE)


def test_grpo_without_a_reward_is_said(tmp_path):
    row = {"prompt": "1=", "chosen": "a", "rejected": "b"}
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(20)))
    with pytest.raises(
        UserError, match="contestant 'grpo' learns from rewards: name them with --reward_funcs, or add a"
    ):
        main(["sft", "grpo", *SMALL, "--dataset_name", str(tmp_path / "mine.jsonl"), "--output_dir", str(tmp_path)])
