"""The page says what the files of the runs say, takes nothing from elsewhere, and executes nothing of the data."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from logratio.benchmarks.report import main
from logratio.trainers.errors import UserError

from ._folders import completion, completions, folder, line, options, preference, sampled

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" </pre>"


class Reader(HTMLParser):
    """tags: every element with its attributes. text: what a person reads, scripts and styles left out."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._inside = "", ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += f"{data} "

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def page(*runs: Path, output: Path | None = None) -> Reader:
    """The page that `logratio report` makes of them."""
    words = [str(run) for run in runs] + (["--output", str(output)] if output else [])
    assert main(words) == 0
    reader = Reader()
    reader.feed((output or runs[0] / "report.html").read_text())
    return reader


def executed(attrs: dict[str, str | None]) -> list[str]:
    """Attributes that a browser would run."""
    return [name for name, value in attrs.items() if name.startswith("on") or str(value).startswith("javascript:")]


def curve(reader: Reader, title: str, label: str) -> list[tuple[float, float]]:
    """(step, value) of a line of the chart, back from its pixels."""
    at = next(
        i for i, (tag, attrs) in enumerate(reader.tags) if tag == "svg" and attrs["aria-label"] == f"{title} by step"
    )
    chart = reader.tags[at][1]
    x0, x1, left, right = map(float, chart["data-x"].split())
    y0, y1, bottom, top, log = map(float, chart["data-y"].split())
    for tag, attrs in reader.tags[at + 1 :]:
        if tag == "path" and attrs.get("data-label") == label:
            found = re.findall(r"[ML]([-\d.]+) ([-\d.]+)", attrs["d"])
            parts = [((float(y) - bottom) / (top - bottom), float(x)) for x, y in found]
            values = [y0 * (y1 / y0) ** part if log else y0 + part * (y1 - y0) for part, _ in parts]
            return [
                (x0 + (x - left) / (right - left) * (x1 - x0), value)
                for (_, x), value in zip(parts, values, strict=True)
            ]
        if tag == "svg":
            break
    raise AssertionError(f"{title} has no line {label}")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return folder(tmp_path / "one", [preference(step) for step in range(1, 41)])


def test_figures_and_curves_are_those_of_the_log(run: Path):
    reader = page(run)
    for told in ("steps 40", "loss 0.025", "evaluation loss 0.5", "margin 4", "time in steps 4.8 s"):
        assert told in reader.words
    assert "slowest step 140 ms (step 40)" in reader.words and "tokens 20,000" in reader.words
    steps, values = zip(*curve(reader, "Loss", "training"), strict=True)
    np.testing.assert_allclose(steps, range(1, 41), atol=0.01)
    np.testing.assert_allclose(values, [1 / step for step in range(1, 41)], rtol=2e-3)
    steps, values = zip(*curve(reader, "Loss", "evaluation"), strict=True)
    np.testing.assert_allclose(steps, (10, 20, 30, 40), atol=0.01)
    np.testing.assert_allclose(values, 0.5, rtol=1e-3)
    assert {round(value, 3) for _, value in curve(reader, "Rewards", "rejected")} == {-0.2}


def test_what_a_chart_shows_has_none_of_its_own_and_the_rest_is_folded_away(tmp_path: Path):
    rows = [sampled(step) | {"my/metric": 3.0} for step in range(1, 5)]
    reader = page(folder(tmp_path / "one", rows, options("grpo")))
    charts = {attrs["aria-label"] for tag, attrs in reader.tags if tag == "svg"}
    shown = {f"{name} by step" for name in ("Loss", "Reward", "KL from the reference", "Completion length")}
    assert shown <= charts and "my/metric by step" in charts
    assert not {"completions/min_length by step", "reward_std by step"} & charts
    bands = [attrs for tag, attrs in reader.tags if tag == "path" and "band" in (attrs["class"] or "")]
    assert len(bands) == 2  # reward and completion length
    assert "band: one standard deviation" in reader.words and "tokens; band: shortest to longest" in reader.words
    many = [folder(tmp_path / f"run-{n}", rows, options("grpo")) for n in range(4)]
    reader = page(*many, output=tmp_path / "many.html")
    assert "band" not in reader.words and not [
        t for t, attrs in reader.tags if t == "path" and "band" in attrs["class"]
    ]


def test_several_runs_share_an_axis_and_what_differs_is_marked(tmp_path: Path):
    runs = [
        folder(tmp_path / f"rate-{rate}", [line(1, note="x"), line(last)], options(learning_rate=rate))
        for rate, last in ((1e-5, 100), (1e-4, 50))
    ]
    reader = page(*runs, output=tmp_path / "both.html")
    assert curve(reader, "Loss", "rate-1e-05")[-1][0] == pytest.approx(100, abs=0.2)
    assert curve(reader, "Loss", "rate-0.0001")[-1][0] == pytest.approx(50, abs=0.2)
    assert len({attrs["data-x"] for tag, attrs in reader.tags if tag == "svg"}) == 1
    text = (tmp_path / "both.html").read_text()
    (row,) = re.findall(r'<tr class="differs"><th><code>(.*?)</code></th>(.*?)</tr>', text)
    assert row[0] == "learning_rate" and re.findall("<td.*?>(.*?)</td>", row[1]) == ["1e-05", "0.0001", "1e-06"]
    assert not (runs[0] / "report.html").exists() and not (runs[0] / "README.md").exists()


def test_options_are_told_that_differ_from_their_defaults(run: Path):
    page(run)
    text = (run / "report.html").read_text()
    told, default = text.split("options that are as they are by default")
    changed = re.findall(r'<code>([a-z_0-9]+)</code></th><td class="changed">', told)
    assert changed == ["model_name_or_path", "dtype", "lora_r", "dataset_name", "max_steps"]
    assert 'class="changed"' not in default and "<code>lora_alpha</code></th><td>32.0</td>" in default


def test_conversations_are_told_turn_by_turn_and_equal_rewards_have_no_best(tmp_path: Path):
    asked = json.dumps([{"role": "user", "content": "two and two?"}])
    one = folder(tmp_path / "one", [sampled(step) for step in (1, 2)], options("grpo"))
    completions(one, [completion(step, f"four {step}", 0.5, prompt=asked) for step in (1, 2)])
    told = page(one).words
    assert "user: two and two?" in told and '"role"' not in told
    assert "All rewards are equal there: no completion is the best or the worst." in told
    assert "Best" not in told and "Worst" not in told and "Completion step 2" in told
    completions(one, [completion(2, f"four {reward}", reward, prompt=asked) for reward in (0.5, 1.0)])
    told = page(one).words
    assert "Best and worst of step 2" in told and "All rewards are equal" not in told


def test_nothing_of_the_data_is_markup(tmp_path: Path):
    config = options("grpo")
    config["data"]["dataset_name"] = [EVIL]
    config["about"]["commit"] = EVIL
    config["loss"][EVIL] = EVIL
    rows = [sampled(step) | {EVIL: 1.0} for step in (1, 2, 3)]
    card = {"train": {"examples": 1, "sets": [{"name": EVIL, "examples": 1, "skipped": 1, "skipped_reasons": EVIL}]}}
    skipped = [{"data": EVIL, "row": 0, "reason": EVIL}]
    one = folder(tmp_path / "<b>one & only", rows, config, data_card=card, skipped_rows=skipped)
    (one / "config.json").write_text("{}")
    completions(one, [completion(step, EVIL, float(step), prompt=EVIL, finish_reason=EVIL) for step in (1, 2, 3)])
    reader = page(one)
    assert [tag for tag, _ in reader.tags if tag in ("script", "img", "b")].count("script") == 1
    assert not [tag for tag, attrs in reader.tags if tag == "img" or executed(attrs)]
    assert reader.text.count(EVIL) >= 8  # a person reads it all the same
    other = folder(tmp_path / 'two<i>" onload="alert(1)', [line(1)])
    both = page(one, other, output=tmp_path / "both.html")
    assert other.name in both.text and not [tag for tag, attrs in both.tags if tag == "img" or executed(attrs)]
    assert other.name in {attrs.get("data-label") for _, attrs in both.tags}


def test_the_page_loads_nothing(tmp_path: Path, run: Path):
    for tag, attrs in page(run).tags:
        for name, value in attrs.items():
            if name in ("src", "href", "data", "poster", "action", "xlink:href", "srcset"):
                assert value.startswith(("#", "data:")), (tag, name, value)
    text = (run / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import", text)


def test_plan_stands_beside_what_was_measured_on_a_gpu(tmp_path: Path):
    from logratio.benchmarks.plan import Options, planned

    config = options()
    config["about"] |= {"device": "NVIDIA H100 80GB HBM3", "device_mem_mib": 81000.0}
    lengths = {"prompt_tokens": 100.4, "completion_tokens": 51.0}
    card = {"train": {"examples": 8, "sets": [], **lengths}}
    told = page(folder(tmp_path / "gpu", [preference(1)], config, data_card=card)).words
    shape = {"model_name_or_path": "Qwen2.5-0.5B", "lora_r": 16, "prompt_tokens": 100, "completion_tokens": 51}
    mib = planned(Options(**shape, method="dpo", gpu="H100"))["predicted_peak_mem_mib"]
    assert f"peak memory 700 MiB {mib:,.0f} MiB {700 / mib:.2f}" in told
    own = page(folder(tmp_path / "own", [preference(1)], {**config, "loss_class": "my:Own"}, data_card=card)).words
    assert "No plan stands beside it: the plan knows no loss of one's own." in own
    config["model"]["model_name_or_path"] = "nobody/knows-it"
    told = page(folder(tmp_path / "unknown", [preference(1)], config, data_card=card)).words
    assert "No plan stands beside it: nothing is known of the model 'nobody/knows-it'" in told
    config["train"]["micro_batch_tokens"] = "auto"
    told = page(folder(tmp_path / "auto", [preference(1)], config, data_card=card)).words
    assert "No plan stands beside it: run_config.json has no number of micro_batch_tokens, but auto." in told
    config["train"]["mixed_precision"] = "bf16"
    told = page(folder(tmp_path / "autocast", [preference(1)], config, data_card=card)).words
    assert "No plan stands beside it: the plan does not model autocast." in told


def test_of_a_cpu_no_plan_is_told(run: Path):
    assert "No plan stands beside it: the plan is of a GPU's memory, and this ran on a CPU." in page(run).words


def test_the_data_card_is_told(tmp_path: Path):
    counts = {"rows": 100, "examples": 90, "truncated": 18, "tokens_cut": 1234, "skipped": 10, "dropped": 0}
    one = {"name": "rows.jsonl", **counts, "skipped_reasons": "10 x 'chosen' has no text to learn from"}
    train = {"examples": 80, "streamed": False, "prompt_tokens": 12.0, "completion_tokens": 3.5, "sets": [one]}
    card = {"train": train, "evaluation": {"examples": 10, "sets": [], "prompt_tokens": 12.0}}
    skipped = [{"data": "rows.jsonl", "row": 7, "line": 8, "reason": "'chosen' has no text"}] * 10
    told = page(folder(tmp_path / "one", [line(1)], data_card=card, skipped_rows=skipped)).words
    assert "100 rows, 90 examples, 18 completions truncated, 1,234 tokens cut off, 10 rows skipped" in told
    assert "whole 72 %" in told and "with a completion cut 18 %" in told and "skipped 10 %" in told
    assert "held out of the rows above to evaluate on 10 examples" in told.replace(" , ", ", ")
    assert "10 skipped rows: the first ones rows.jsonl, row 7, line 8: 'chosen' has no text" in told


@pytest.mark.parametrize("missing", ["metrics.jsonl", "run_config.json"])
def test_a_folder_that_is_no_run_is_named(run: Path, missing: str):
    (run / missing).unlink()
    said = f"{run} has no {missing}, so it is no run: give an --output_dir of `logratio train`"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        main([str(run)])


def test_what_cannot_be_made_a_page_of_is_said(tmp_path: Path, run: Path):
    empty = folder(tmp_path / "empty", [])
    for words, said in (
        ([tmp_path / "nowhere"], "nowhere is no folder, so it is no run"),
        ([empty], "has no step yet: wait for the first one"),
        ([run, run], "is given twice"),
        ([run, "--output", tmp_path], "is a folder; give a file, such as"),
        ([run, "--output", tmp_path / "no" / "x.html"], "there is no folder"),
        ([run, "--out", tmp_path], "--out is of the benchmarks' report"),
        (["--output", "x.html"], "--output x.html is of the page of runs"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            main([str(word) for word in words])
    (run / "run_config.json").write_text("{")
    with pytest.raises(UserError, match="run_config.json cannot be read as JSON"):
        main([str(run)])


def test_a_file_of_somebody_else_is_not_overwritten(run: Path):
    target = run / "report.html"
    target.write_text("<p>mine</p>")
    with pytest.raises(UserError, match="was not made by `logratio report`, and is not overwritten"):
        main([str(run)])
    assert target.read_text() == "<p>mine</p>"
    target.unlink()
    page(run)
    page(run)  # its own it replaces
    assert {p.name for p in run.iterdir()} == {"metrics.jsonl", "run_config.json", "report.html"}


def test_a_log_that_is_being_written_or_is_damaged(tmp_path: Path):
    one = folder(tmp_path / "one", [line(1), line(2), line(3)])
    rows = [json.dumps(line(n)) for n in (1, 2, 3)]
    (one / "metrics.jsonl").write_text("\n".join([rows[0], "noise", rows[1], rows[2][:30]]))
    told = page(one).words
    assert "steps 2" in told and "loss 0.5" in told
    assert "metrics.jsonl: its last line is cut off, and left out." in told
    assert "metrics.jsonl: 1 line could not be read and left out (2)." in told
    assert "no trained model is saved there: the run has not ended, or ended early." in told


def test_where_steps_come_twice_the_later_line_counts(tmp_path: Path):
    rows = [line(n) for n in (1, 2, 3, 4)] + [line(n) | {"loss": 7.0} for n in (3, 4, 5)]
    reader = page(folder(tmp_path / "one", rows))
    assert [round(step) for step, _ in curve(reader, "Loss", "training")] == [1, 2, 3, 4, 5]
    assert [round(value, 1) for _, value in curve(reader, "Loss", "training")][1:] == [0.5, 7.0, 7.0, 7.0]
    assert "its steps go back at line 5; where a step comes twice, the later line counts" in reader.words


def test_files_that_somebody_has_changed_end_in_no_traceback(tmp_path: Path):
    half = json.loads('"\\ud83d"')  # of a character
    odd = {"loss": 10**400, "step_ms": math.nan, "grad_norm": -math.inf, "peak_mem_mib": None}
    rows = [line(1) | odd, {"step": True}, {"step": 10**30}, {"step": 2.5}, [], {}, line(2) | odd]
    card = {"train": {"sets": [3, {"name": half, "examples": 1}]}, "evaluation": 7}
    for number, config in enumerate(
        ({}, {"about": 3, "loss": [], "method": None}, options() | {"loss_class": "my:Own"})
    ):
        one = folder(tmp_path / f"run-{number}", rows, config, data_card=card, skipped_rows=[3, {"reason": half}])
        (one / "config.json").write_text("{}")
        told = page(one).words
        assert "5 lines could not be read and left out (2, 3, 4, 5, 6)" in told and "steps 2" in told
        assert (one / "README.md").exists()
    (one / "data_card.json").write_text("[]")
    assert "data_card.json cannot be read." in page(one).words


def test_what_the_run_said_is_there_with_its_step(tmp_path: Path):
    lines = [("note", 0, "prompts are not shared"), ("alarm", 7, f"the gradient is 0 {EVIL}"), ("end", 9, "exploded")]
    said = [{"step": step, "kind": kind, "text": text} for kind, step, text in lines]
    one = folder(tmp_path / "one", [line(n) for n in range(1, 10)], notes=[*said, 7, {"step": 1}])
    two = folder(tmp_path / "two", [line(1)], notes=[{"step": 1, "kind": "alarm", "text": "of the second"}])
    told = page(one)
    assert "What it said step 7 the gradient is 0 <script>" in told.words
    assert "ended at step 9 exploded 1 note step 0 prompts are not shared" in told.words
    assert [attrs for tag, attrs in told.tags if executed(attrs)] == []
    assert "notes.jsonl: line 4 could not be read and is left out" in told.words
    assert "notes.jsonl: line 5 could not be read and is left out" in told.words
    both = page(one, two, output=tmp_path / "both.html").words
    assert both.index("What they said one ") < both.index(" two step 1 of the second ")
    assert "What it said" not in page(folder(tmp_path / "three", [line(1)])).words


def test_a_run_of_one_step_and_values_that_are_no_numbers(tmp_path: Path):
    odd = {"loss": math.nan, "grad_norm": math.inf, "word": "text", "flag": True, "none": None}
    reader = page(folder(tmp_path / "one", [line(1) | odd]))
    assert "steps 1" in reader.words
    rows = [line(n) | ({"loss": math.nan} if n == 3 else {}) for n in range(1, 6)]
    reader = page(folder(tmp_path / "two", rows))
    assert [round(step) for step, _ in curve(reader, "Loss", "training")] == [1, 2, 4, 5]
