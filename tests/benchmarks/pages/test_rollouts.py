"""What GRPO sampled, on the page: the best and the worst of the last stretch, early beside late, shares of rewards."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from logratio.benchmarks.pages.rollouts import rollouts
from logratio.benchmarks.pages.runs import read_run

from ._folders import completion, completions, folder, line, options, sampled


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return folder(tmp_path / "one", [sampled(step) for step in range(1, 9)], options("grpo"))


def found(path: Path):
    run = read_run(path, "one")
    return rollouts(run), run.notes


def test_best_and_worst_are_of_the_last_stretch_and_of_different_prompts(run: Path):
    rows = [
        completion(step, f"{step}{p}", step / 10 + n / 100, prompt=p)
        for step in range(1, 9)
        for n, p in enumerate("abcd")
    ]
    completions(run, rows)
    one, _ = found(run)
    assert one.count == 32 and one.last == (7, 8)
    assert [(s.step, s.text) for s in one.best] == [(8, "8d"), (8, "8c"), (8, "8b")]
    assert [(s.step, s.text) for s in one.worst] == [(7, "7a"), (7, "7b"), (7, "7c")]
    assert one.best[0].figures == "reward 0.83 · advantage 0 · 2 tokens · stop"


def test_what_sampled_them_is_shown(run: Path):
    """By which engine and policy, its log-prob, and how far the trainer's is from it, in shares of the completions."""
    by = {"engine": "vllm", "policy_version": 7}
    rows = [completion(8, "a", 0.0, sampler_logp=-1.5, logp_diff=2e-7, **by)]
    completions(run, [completion(1, "b", 1.0, sampler_logp=-2.5, logp_diff=None, **by), *rows])
    one, _ = found(run)
    assert one.equal[0].figures == (
        "reward 0 · advantage 0 · 1 tokens · stop · sampler_logp -1.5 · logp_diff 2e-7 · by vllm with the policy after "
        "step 7"
    )
    assert [name for name, _ in one.histograms] == ["reward", "sampler_logp", "logp_diff"]
    assert re.findall(r"<title>(.*?)</title>", one.histograms[-1][1]) == ["2e-7: 100.0 %"]


def test_early_and_late_are_of_the_same_prompts_where_there_are_such(run: Path):
    rows = [completion(1, "early", 0.0, prompt="p"), completion(1, "once", 0.0, prompt="q")]
    completions(run, [*rows, completion(4, "x", 0.0, prompt="z"), completion(8, "late", 1.0, prompt="p")])
    one, _ = found(run)
    assert one.same and [(a.text, b.text) for a, b in one.pairs] == [("early", "late")]
    completions(run, [*rows, completion(8, "late", 1.0, prompt="r")])
    one, _ = found(run)
    assert not one.same and [(a.text, b.text) for a, b in one.pairs] == [("early", "late")]


def test_histograms_have_the_shares_of_each_stretch(run: Path):
    rows = [completion(1, "a", 0.0)] * 3 + [completion(1, "a", 1.0)] + [completion(8, "a", 1.0)] * 4
    completions(run, rows)
    one, _ = found(run)
    ((name, svg),) = one.histograms  # of a single function the sum says it all
    assert name == "reward"
    bars = re.findall(r"<title>(.*?)</title>", svg)
    assert bars == ["0: 75.0 %", "1: 25.0 %", "1: 100.0 %"]
    assert re.findall(r'class="soft">(.*?)<', svg) == ["mean 0.25", "none", "none", "mean 1"]


def test_a_histogram_of_many_values_and_a_function_of_its_own(run: Path):
    rows = [completion(1 + n // 50, "a", n / 199, **{"rewards/format": 1.0}) for n in range(200)]
    completions(run, rows)
    one, _ = found(run)
    assert [name for name, _ in one.histograms] == ["reward", "rewards/format", "rewards/right"]
    shares = [float(share) for share in re.findall(r": ([\d.]+) %</title>", one.histograms[0][1])]
    assert sum(shares) == pytest.approx(400, abs=1.5)


def test_conversations_missing_columns_and_long_texts(run: Path):
    turns = [{"role": "user", "content": "1+1?"}]
    completions(run, [{"step": 1, "prompt": turns, "completion": [{"role": "assistant", "content": "y" * 4000}]}])
    one, notes = found(run)
    assert one.best == one.worst == one.pairs == one.histograms == [] and notes[:1] != ["completions.parquet"]
    completions(run, [{"step": n, "completion": "y" * 4000} for n in (1, 2)])
    one, _ = found(run)
    ((early, late),) = one.pairs
    assert (early.step, late.step, early.prompt) == (1, 2, "") and early.text.endswith("(2,500 more characters)")


def test_without_completions_there_is_nothing_and_what_cannot_be_read_is_said(run: Path, tmp_path: Path):
    assert found(run)[0] is None
    (run / "completions.parquet").write_bytes(b"PAR1 and then it was cut")
    one, notes = found(run)
    assert one is None and any(note.startswith("completions.parquet cannot be read") for note in notes)
    completions(run, [{"text": "a"}])
    one, notes = found(run)
    assert one is None and "completions.parquet lacks 'step' or 'completion'" in notes
    completions(run, [{"step": None, "completion": "a"}, {"step": 1, "completion": None}])
    one, notes = found(run)
    assert one is None and "completions.parquet: 'step' must be whole numbers" in notes
    assert found(folder(tmp_path / "sft", [line(1)]))[0] is None
