"""`logratio bench RUN.yaml` as a user calls it: what it measures, prints and leaves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from logratio.benchmarks.memory.geometry import Geometry
from logratio.benchmarks.own.command import name_of, names_a_run, parsed, train_words
from logratio.trainers import cli
from logratio.trainers.options import parse_train
from logratio.trainers.policy.tiny import tiny_config

from ..pages._chromium import browser, chromium

RUN = """lora_r: 4
batch_size: 6
micro_batch_tokens: 64
beta: 0.2
loss_type: hinge
eval_size: 3
output_dir: trained/here
dataset_name: <b>rows</b>.jsonl
"""
SUITES = ("quick", "head", "all")


def rows(path: Path) -> None:
    pairs = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": "9" * (1 + i % 4)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(folder, status, what was printed) of a DPO run with adapters, its page and its lines."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("mine.yaml").write_text(RUN)
        (folder / "<b>rows<").mkdir()
        rows(folder / "<b>rows<" / "b>.jsonl")
        status = cli.main(["bench", "mine.yaml", "--method", "dpo", "--repeats", "2", "--steps", "2"])
    return folder, status


def lines(folder: Path) -> dict[str, dict]:
    found = [json.loads(line) for line in (folder / "bench/mine/bench.jsonl").read_text().splitlines()]
    return {row["contestant"]: row for row in found}


def test_both_sides_are_measured_on_the_runs_own_options(measured):
    folder, status = measured
    assert status == 0
    found = lines(folder)
    ours, theirs = found["logratio"], found["trl"]
    assert ours["status"] == theirs["status"] == "ok", theirs.get("error")
    assert 0 < theirs["grad_rel_err"] < 1e-4, "hinge with beta 0.2 on both sides"
    for row in (ours, theirs):
        assert (row["suite"], row["case"], row["method"]) == ("run", "dpo-lora-tiny-b>.jsonl", "dpo")
        assert len(row["times_ms"]) == 2 and row["tokens_per_s"] > 0 and 0 < row["host_share"] < 1
        assert row["certificate"]["settings"]["loss"]["beta"] == 0.2
    assert ours["time_to_ours"] == 1 and ours["parts"]["forward and backward"] > 0


def test_memory_is_told_by_part_beside_the_plan(measured):
    ours = lines(measured[0])["logratio"]
    size = Geometry.of(tiny_config())
    adapters = 4 * sum(size.adapters(4)) / 2**20
    assert ours["memory_mib"]["adapters"] == ours["memory_mib"]["gradients"] == adapters
    assert ours["memory_mib"]["optimizer"] == pytest.approx(2 * adapters, rel=1e-2)  # and its counts of steps
    assert ours["memory_mib"]["weights"] == pytest.approx(4 * sum(size.parameters()) / 2**20, rel=1e-3)
    for part, mib in ours["planned_mib"].items():
        assert ours["memory_mib"][part] == pytest.approx(mib, rel=0.02, abs=1e-3), part
    assert ours["memory_mib"]["all"] == pytest.approx(
        sum(mib for part, mib in ours["memory_mib"].items() if part != "all")
    )


def test_the_largest_and_the_fastest_budget_are_found(measured):
    ours = lines(measured[0])["logratio"]
    budgets = {one["tokens"]: one for one in ours["budgets"]}
    assert 64 in budgets and ours["largest"] == max(budgets) and ours["fastest"] in budgets
    assert ours["largest_bound_by"] == "data", "a CPU's memory is not tried"
    counts = [budgets[tokens]["micro_batches"] for tokens in sorted(budgets)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] >= 1
    kept = [budgets[tokens]["memory_mib"] for tokens in sorted(budgets)]
    assert kept == sorted(kept), "more tokens at a time keep more"
    assert budgets[64]["to_asked"] == 1 and all(one["step_ms"] > 0 for one in budgets.values())


def test_nothing_is_left_but_the_page_and_the_lines(measured):
    folder, _ = measured
    assert sorted(path.name for path in folder.iterdir()) == ["<b>rows<", "bench", "mine.yaml"]
    assert sorted(path.name for path in (folder / "bench/mine").iterdir()) == ["bench.html", "bench.jsonl"]


def test_the_page_holds_it_all_and_escapes_what_is_the_users(measured):
    page = (measured[0] / "bench/mine/bench.html").read_text()
    assert page.startswith("<!doctype html>") or "<!doctype html>" in page[:50]
    for part in ("Time of a step", "Memory of a step by part", "Time by budget", "dpo (hinge)", "<code>beta</code>"):
        assert part in page
    assert "<b>rows" not in page and "&lt;b&gt;rows" in page
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page


@pytest.mark.skipif(browser() is None, reason="needs Chromium or Chrome")
def test_the_page_fits_narrow_and_wide_light_and_dark(measured):
    overflow = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') &&
      e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName)"""
    smallest = """Math.min(...[...document.querySelectorAll('svg text')].map((e) => { const svg = e.closest('svg');
      return parseFloat(getComputedStyle(e).fontSize) * svg.clientWidth / svg.viewBox.baseVal.width; }))"""
    with chromium() as tab:
        for width, dark in ((390, False), (390, True), (1440, False), (1440, True)):
            tab.open(measured[0] / "bench/mine/bench.html", width, dark=dark)
            assert tab.value("document.documentElement.scrollWidth") == width
            assert tab.value(overflow) == [] and tab.value(smallest) >= 9
            ground = tab.value("getComputedStyle(document.body).backgroundColor")
            assert (ground == "rgb(255, 255, 255)") == (not dark) and tab.errors == []
            assert len([url for url in tab.requests if not url.startswith("data:")]) == 1


REFUSED = {
    "missing.yaml": "missing.yaml: there is no such file, and no suite of this name (quick, head, ",
    "stpe": "stpe: there is no such file, and no suite of this name (quick, head, ",
    "list.yaml": "list.yaml must map option names to values, got a list",
    "broken.yaml": "broken.yaml cannot be read: while parsing a flow sequence",
    "any.yaml": "any.yaml does not say its method, and fits sft, dpo, ",
    "any.yaml --method dqo": "unknown method 'dqo', expected one of: ",
    "any.yaml --method dpo --output any.yaml": "--output any.yaml is no folder that can be written to (File exists)",
    "any.yaml --method dpo --repeats 0": "--repeats must be positive, got 0",
    "folder": "folder/run_config.json: there is no such file",
    "any.yaml --method dpo --dataset_name none.jsonl --output new/one": "none.jsonl",
    "any.yaml --method dpo --output others": "others/bench.html was not made by `logratio bench`, and is not ",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_one_sentence_and_leaves_nothing(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in {"any": "lora_r: 4", "list": "- 1", "broken": "[1"}.items():
        Path(f"{name}.yaml").write_text(text)
    Path("folder").mkdir()
    Path("others").mkdir()
    Path("others/bench.html").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["bench", *words.split()]) == 1
    said = capsys.readouterr().err
    assert said.startswith("logratio: ") and said.count("\n") == 1 and REFUSED[words] in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_suite_is_still_a_suite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").touch()
    assert not names_a_run(["quick", "--only", "dpo"], SUITES) and not names_a_run(["--help"], SUITES)
    assert not names_a_run([], SUITES) and not names_a_run(["--repeats", "2", "head"], SUITES)
    assert names_a_run(["dpo", "--config", "run.yaml"], SUITES)
    assert names_a_run(["run.yaml"], SUITES) and names_a_run(["--repeats", "2", "run.yaml"], SUITES)


def test_other_options_go_to_the_run():
    options, rest = parsed(["run.yaml", "--lora_r", "8", "--no-trl", "--reward_funcs", "a:b", "c:d", "--repeats", "2"])
    assert (options.run, options.trl, options.repeats) == ("run.yaml", False, 2)
    assert rest == ["--lora_r", "8", "--reward_funcs", "a:b", "c:d"]


def test_a_run_is_named_by_file_folder_or_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/one").mkdir(parents=True)
    config = parse_train(["kto", "--lora_r", "8"]).as_dict()
    Path("runs/one/run_config.json").write_text(json.dumps(config))
    Path("mine.yaml").write_text("lora_r: 8")
    for words, name in (
        ("mine.yaml --method kto", "mine"),
        ("kto --config mine.yaml", "mine"),
        ("kto --lora_r 8", "kto"),
        ("runs/one", "one"),
        ("runs/one/run_config.json", "one"),
    ):
        options, rest = parsed(words.split())
        assert name_of(options.run, rest) == name
        run = parse_train(train_words(options, rest))
        assert (run.method, run.model.lora_r) == ("kto", 8)
