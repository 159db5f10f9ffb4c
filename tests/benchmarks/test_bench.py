"""The suites: which cases, how they measure, and what they leave behind when something goes wrong."""

import json
import math
import random
import statistics
from types import SimpleNamespace

import pytest
import torch

from logratio.benchmarks import bench
from logratio.benchmarks.measure import clock as measure
from logratio.benchmarks.measure import divergence, head
from logratio.benchmarks.measure.steps import step
from logratio.benchmarks.measure.steps.step_cases import (
    METHODS,
    StepCase,
    cpu_cases,
    gpu_cases,
    published_cases,
    quick_cases,
    scale_cases,
)
from logratio.benchmarks.measure.steps.workloads import WORKLOADS, Lengths, count_padded, examples
from logratio.benchmarks.reporting.records import read
from logratio.losses import LOSSES
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.errors import UserError

CPU = torch.device("cpu")
SHORT = Lengths(6, 9, 0.4, 0.4, max_length=32)


@pytest.mark.parametrize("name", WORKLOADS)
def test_lengths_have_the_moments_they_name(name):
    lengths, rng = WORKLOADS[name], random.Random(0)
    wide = Lengths(
        lengths.prompt,
        lengths.completion,
        lengths.prompt_cv,
        lengths.completion_cv,
        lengths.correlation,
        max_length=10**9,
    )
    drawn = [wide.draw(rng, 1) for _ in range(20000)]
    prompts, answers = [p for p, _ in drawn], [c[0] for _, c in drawn]
    assert statistics.mean(prompts) == pytest.approx(lengths.prompt, rel=0.03)
    assert statistics.mean(answers) == pytest.approx(lengths.completion, rel=0.03)
    assert statistics.pstdev(prompts) / lengths.prompt == pytest.approx(lengths.prompt_cv, abs=0.03)
    assert statistics.pstdev(answers) / lengths.completion == pytest.approx(lengths.completion_cv, abs=0.03)
    if lengths.correlation:
        logs = [[math.log(x) for x in side] for side in (prompts, answers)]
        assert statistics.correlation(*logs) == pytest.approx(lengths.correlation, abs=0.03)
    assert all(p + c[0] <= lengths.max_length for p, c in (lengths.draw(rng, 1) for _ in range(2000)))


def test_examples_are_what_the_kind_of_the_loss_asks_for():
    made = {m: examples(LOSSES[m](), SHORT, 4, vocab_size=50, seed=0, group=5) for m in (*METHODS, "tpo")}
    assert {m: len(e[0].completions) for m, e in made.items()} == {
        "sft": 1,
        "dpo": 2,
        "kto": 1,
        "orpo": 2,
        "grpo": 5,
        "tpo": 3,
    }
    assert [e.label for e in made["kto"]] == [True, False, True, False]
    assert all(len(e.advantages) == 5 for e in made["grpo"])
    assert all(0 <= t < 50 for e in made["dpo"] for c in e.completions for t in c.ids)


def test_trls_micro_batches_are_the_largest_that_fit_ours():
    def window(*completions):
        return [Example([1] * 10, [Completion([2] * n) for n in pair], advantages=None) for pair in completions]

    pairs = window((10, 5), (20, 1), (3, 3), (8, 10))  # sequences of 20 15, 30 11, 13 13, 18 20
    case = StepCase("dpo", "lora", "tiny", "fixed", 4, 120)
    assert case.per_micro_batch(pairs) == 2  # 2 sequences of 30 tokens a pair
    assert case.padded_by_peer(pairs) == 4 * 30 + 4 * 20
    assert StepCase("dpo", "lora", "tiny", "fixed", 4, 10).per_micro_batch(pairs) == 1
    assert StepCase("dpo", "lora", "tiny", "fixed", 4, 180).per_micro_batch(pairs) == 2  # 3 fit, and do not divide 4
    groups = [
        Example([1] * 4, [Completion([2] * n) for n in (3, 9)], advantages=(1.0, 2.0)),
        Example([1] * 6, [Completion([2] * n) for n in (5, 5)], advantages=(1.0, 2.0)),
    ]
    case = StepCase("grpo", "lora", "tiny", "fixed", 2, 30)
    assert case.per_micro_batch(groups) == 2  # completions, of 13 tokens with their prompts
    assert case.padded_by_peer(groups) == 2 * (4 + 9) + 2 * (6 + 5)
    assert count_padded([3, 1, 4], 2) == 2 * 3 + 4


def test_contestants_take_turns():
    calls = []
    works = {name: (lambda round_, name=name: calls.append((name, round_))) for name in "abc"}
    times = measure.interleaved(works, CPU, repeats=3, warmup=1)
    assert [len(values) for values in times.values()] == [3, 3, 3]
    assert "".join(name for name, _ in calls) == "cab" + "abc" + "bca" + "cab"
    assert [round_ for _, round_ in calls] == [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3
    calls.clear()
    measure.interleaved(works, CPU, repeats=1)
    assert [round_ for _, round_ in calls] == [-1] * 3 + [0] * 3, "what nobody asks for as well: a warm-up"


def test_percentiles_and_paired_ratios_by_hand():
    assert measure.percentiles([5, 1, 4, 2, 3], "t") == pytest.approx({"t_p20": 1.8, "t_p50": 3, "t_p80": 4.2})
    assert measure.percentiles([1, 2, 30], "t") == {"t_p20": 1, "t_p50": 2, "t_p80": 30}
    assert measure.percentiles([5, 1], "t") == {"t_p20": 1, "t_p50": 3, "t_p80": 5}
    assert measure.median_ratio([2, 9, 30], [1, 3, 10]) == 3


def test_rates_are_medians_of_the_rounds_each_with_its_own_tokens():
    windows = [[Example([1] * 10, [Completion([2] * 10)])] * n for n in (1, 2, 3)]
    row = step.rates([1000.0, 1000.0, 100.0, 500.0], windows)
    assert row["tokens_per_s"] == 40 and row["examples_per_s"] == 2  # of 20 40 600 40 and 1 2 30 2
    assert row["num_tokens"] == 40 and row["step_ms_p50"] == 750


def test_peak_memory_is_without_what_the_others_keep(monkeypatch):
    monkeypatch.setattr(step, "free_memory", lambda: None)
    monkeypatch.setattr(step, "allocated_mib", lambda device: 70.0)
    monkeypatch.setattr(step, "kept_mib", lambda contestant: 30.0)
    monkeypatch.setattr(step, "peak_mem", lambda work, device, beyond: 100.0 - beyond)
    idle = SimpleNamespace(prepare=list, backward=lambda batch, following: None, update=lambda: None)
    assert step.memory(None, idle, [], SimpleNamespace(type="cuda")) == {"peak_mem_mib": 60.0}


def test_head_errors_are_against_float64_and_rates_are_of_the_least_work():
    case = head.HeadCase("x", 16, 50, 24, "float32", trainable=True)
    rows = head.run(case, CPU, repeats=1, seed=0)
    assert rows["logratio (triton)"] == {"status": "refused", "error": "needs a GPU"}
    for name in ("logratio (two_gemm)", "eager", "trl"):
        row = rows[name]
        assert row["status"] == "ok", row
        assert 0 < row["grad_hidden_err"] < 1e-5 and 0 < row["grad_weight_err"] < 1e-5
        assert row["tflops"] == pytest.approx(2 * 3 * 24 * 16 * 50 / row["time_ms_p50"] / 1e9)
    assert rows["eager"]["logps_err"] < 1e-5 and rows["trl"]["logps_err"] is None


def test_a_frozen_head_needs_two_products():
    rows = head.run(head.HeadCase("x", 16, 50, 24, "float32", trainable=False), CPU, repeats=1, seed=0)
    row = rows["eager"]
    assert row["tflops"] == pytest.approx(2 * 2 * 24 * 16 * 50 / row["time_ms_p50"] / 1e9)
    assert row["share_of_gemm"] == pytest.approx(row["tflops"] / row["gemm_tflops"])


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_divergence_needs_three_products_and_all_compute_the_same(beta):
    case = head.HeadCase("x", 16, 50, 24, "float32", False, beta)
    known = divergence.contestants(beta)
    rows = head.run(case, CPU, known, exact=known["logratio (two_gemm)"], repeats=1, seed=0)
    assert list(rows) == list(known)
    assert all(rows[name]["status"] == "refused" for name in ("logratio (triton)", "liger (jsd)"))
    for name in ("logratio (two_gemm)", "eager", "trl"):
        row = rows[name]
        assert row["status"] == "ok", row
        assert row["tflops"] == pytest.approx(2 * 3 * 24 * 16 * 50 / row["time_ms_p50"] / 1e9)
    # TRL's is a mean: of other coefficients, and against a truth of its own
    assert all(0 < rows[name]["grad_hidden_err"] < 1e-5 for name in ("logratio (two_gemm)", "eager", "trl"))
    assert 0 < rows["eager"]["logps_err"] < 1e-5 and rows["trl"]["logps_err"] is None


def test_a_wrong_head_has_an_error(monkeypatch):
    right = head.CONTESTANTS["eager"]
    monkeypatch.setitem(head.CONTESTANTS, "eager", right._replace(loss=lambda x: 1.01 * right.loss(x)))
    rows = head.run(head.HeadCase("x", 16, 50, 24, "float32", trainable=False), CPU, repeats=1, seed=0)
    assert rows["eager"]["grad_hidden_err"] == pytest.approx(0.01, rel=1e-3)


def test_a_run_is_recorded_and_gone_on_with(tmp_path, monkeypatch, capsys):
    ran = []

    def fake(case, device, *, repeats, seed, only, with_truth):
        ran.append(case.case)
        if case.method == "kto":
            raise torch.OutOfMemoryError("no room")
        return {name: {"status": "ok", "step_ms_p50": 1.0, "peak_mem_mib": float("nan")} for name in only}

    monkeypatch.setattr(step, "run", fake)
    words = ["step", "--device", "cpu", "--results", str(tmp_path), "--contestants", "logratio", "trl"]
    assert bench.main([*words, "--budget-s", "-1"]) == 0
    assert not ran and "5 cases are left" in capsys.readouterr().out
    assert bench.main(words) == 0
    assert ran == [case.case for case in cpu_cases()]
    rows = list(read(tmp_path))
    assert len(rows) == 2 * len(ran)
    assert {row["status"] for row in rows if row["method"] == "kto"} == {"oom"}
    row = rows[0]
    assert row["peak_mem_mib"] is None and row["suite"] == "step" and row["adapter"] == "lora"
    assert row["certificate"]["settings"]["dtype"] == "float32" and row["certificate"]["settings"]["seed"] == 0
    assert bench.main(words) == 0 and len(ran) == 5  # nothing is measured twice
    assert bench.main([*words, "--only", "orpo", "--fresh"]) == 0 and len(ran) == 6
    assert json.loads((tmp_path / "cpu.jsonl").read_text().split("\n")[-2])["method"] == "orpo"


def test_a_case_is_done_where_all_that_can_run_have_a_line(tmp_path, monkeypatch):
    ran = []

    def fake(case, device, *, only, **more):
        ran.append(case.case)
        ok = {"status": "ok", "step_ms_p50": 1.0, "parts": {"packing": float("inf")}}
        refused = {"trl+liger": {"status": "refused", "error": "no GPU"}}
        return {name: dict(ok) for name in only} | refused

    monkeypatch.setattr(step, "run", fake)
    words = ["step", "--device", "cpu", "--results", str(tmp_path), "--only", "sft"]
    assert bench.main(words) == bench.main(words) == 0 and len(ran) == 1
    file = tmp_path / "cpu.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["parts"] == {"packing": None}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines if line["contestant"] != "trl"))
    assert bench.main(words) == 0 and len(ran) == 2, "trl has no line"


def test_a_case_that_cannot_be_built_has_failed_for_everybody_and_is_tried_again(tmp_path, monkeypatch):
    def fails(*args, **more):
        raise RuntimeError("such a model\nthere is not")

    monkeypatch.setattr(step, "run", fails)
    words = ["step", "--device", "cpu", "--results", str(tmp_path), "--only", "sft", "--contestants", "logratio", "trl"]
    assert bench.main(words) == bench.main(words) == 1
    told = [(row["contestant"], row["status"], row["error"]) for row in read(tmp_path)]
    assert told == 2 * [(name, "failed", "RuntimeError: such a model") for name in ("logratio", "trl")]


def test_a_failure_makes_the_status(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "run", lambda *a, only, **k: {n: {"status": "failed", "error": "E"} for n in only})
    assert bench.main(["step", "--device", "cpu", "--results", str(tmp_path), "--only", "sft"]) == 1


def test_of_the_head_too_only_those_are_measured_that_are_asked_for(tmp_path, monkeypatch):
    ran, of_divergences = [], []

    def fake(case, device, contestants, **more):
        (ran if case.beta is None else of_divergences).append(list(contestants))
        return {name: {"status": "ok", "time_ms_p50": 1.0} for name in contestants}

    monkeypatch.setattr(head, "run", fake)
    words = ["head", "--device", "cpu", "--results", str(tmp_path), "--only", "frozen", "--fresh", "--contestants"]
    assert bench.main([*words, "trl", "trl+liger", "logratio"]) == 0
    assert bench.main([*words, "liger (grpo)", "eager"]) == 0
    assert bench.main([*words, "liger"]) == 0
    ours = ["logratio (two_gemm)", "logratio (triton)"]
    assert ran == [[*ours, "trl"], ["eager", "liger (grpo)"], ["liger (cross entropy)", "liger (grpo)"]]
    assert of_divergences == [x for x in ([*ours, "trl"], ["eager"], ["liger (jsd)"]) for _ in range(2)]


def test_what_is_worth_most_comes_first():
    names = [*(case.case for case in gpu_cases()), "head-896x151936-8192-bfloat16-frozen"]
    ordered = sorted(names, key=bench.rank)
    assert ordered[:3] == [names[-1], "dpo-lora-Qwen2.5-0.5B-ultrafeedback", "dpo-qlora-Llama-3.1-8B-ultrafeedback"]
    starts = [start for start in bench.FIRST if not start.startswith("head-")]
    assert all(any(name.startswith(start) for name in names) for start in starts), "one that no case has is misspelt"


def test_bad_input():
    with pytest.raises(UserError, match="--contestants: no trll; there are eager, liger, liger "):
        bench.main(["step", "--contestants", "trl", "trll", "--device", "cpu"])
    with pytest.raises(UserError, match="no case of suite step has a name with nonsense in it"):
        bench.main(["step", "--only", "nonsense", "--device", "cpu"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: torch sees no GPU here; use --device cpu"):
            bench.main(["head", "--device", "cuda"])


def test_no_two_cases_of_a_suite_have_one_name():
    for cases in (cpu_cases(), gpu_cases(), quick_cases(), published_cases() + scale_cases(True), scale_cases(False)):
        names = [case.case for case in cases]
        assert len(names) == len(set(names))
    combinations = {(c.method, c.adapter, c.model) for c in gpu_cases()}
    assert len(combinations) == 5 * (3 + 3 + 2)


def test_cases_of_one_model_build_it_once_and_leave_it_as_it_was(monkeypatch):
    case = StepCase("dpo", "lora", "tiny", "gsm8k", 2, 2048, dtype="float32", num_generations=2, lengths=SHORT)
    built, monkey = [], step.build
    monkeypatch.setattr(step, "build", lambda *words, **named: built.append(words) or monkey(*words, **named))
    model = step.build_of(case, CPU, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for method in ("dpo", "sft"):
        found = step.run(StepCase(**{**vars(case), "method": method}), CPU, repeats=1, seed=0, with_truth=False)
        assert found["trl"]["status"] == found["logratio"]["status"] == "ok"
    assert step.build_of(case, CPU, seed=0) is model and len(built) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert step.build_of(StepCase(**{**vars(case), "lora_r": 2}), CPU, seed=0) is not model
