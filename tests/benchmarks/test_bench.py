"""The suites: what they feed each side, how they measure, what they leave behind when something goes wrong."""

import json
import math
import random
import statistics

import pytest
import torch

from logratio.benchmarks import bench, head, measure, step, trl_contestant
from logratio.benchmarks.contestants import Ours, share_frozen, trained_mib
from logratio.benchmarks.ledger import cosine, difference, gradient, plain, share_changed
from logratio.benchmarks.models import build
from logratio.benchmarks.records import read
from logratio.benchmarks.step_cases import METHODS, StepCase, cpu_cases, gpu_cases, quick_cases, scale_cases
from logratio.benchmarks.workloads import WORKLOADS, Lengths, count_padded, examples
from logratio.losses import LOSSES, DPOLoss
from logratio.reference._trl_batches import unpadded
from logratio.trainers.data import Completion, Example
from logratio.trainers.errors import UserError

CPU = torch.device("cpu")
SHORT = Lengths(6, 9, 0.4, 0.4, max_length=32)


def tiny_case(method="dpo", adapter="lora", **changes) -> StepCase:
    options = {"dtype": "float32", "num_generations": 3, "lengths": SHORT, "lora_r": 4} | changes
    size = options.pop("batch_size", 2 if method == "grpo" else 4)
    return StepCase(method, adapter, "tiny", "short", size, options.pop("micro_batch_tokens", 64), **options)


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
    groups = [
        Example([1] * 4, [Completion([2] * n) for n in (3, 9)], advantages=(1.0, 2.0)),
        Example([1] * 6, [Completion([2] * n) for n in (5, 5)], advantages=(1.0, 2.0)),
    ]
    case = StepCase("grpo", "lora", "tiny", "fixed", 2, 30)
    assert case.per_micro_batch(groups) == 2  # completions, of 13 tokens with their prompts
    assert case.padded_by_peer(groups) == 2 * (4 + 9) + 2 * (6 + 5)
    assert count_padded([3, 1, 4], 2) == 2 * 3 + 4


@pytest.fixture(scope="module")
def steps():
    """One case of every method, run on a CPU."""
    return {m: step.run(tiny_case(m), CPU, repeats=2, seed=0, only=("logratio", "trl")) for m in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_both_sides_compute_the_same_step(steps, method):
    ours, theirs = steps[method]["logratio"], steps[method]["trl"]
    assert ours["status"] == theirs["status"] == "ok", (ours.get("error"), theirs.get("error"))
    assert 0 < theirs["grad_rel_err"] < 1e-4 and "grad_rel_err" not in ours
    for row in (ours, theirs):
        assert row["ledger"]["logps_err"] < 1e-5 and row["ledger"]["grad_cosine"] > 1 - 1e-6
        assert row["ledger"]["share_changed"] > 0.99
        assert len(row["times_ms"]) == 2 and row["step_ms_p20"] <= row["step_ms_p50"] <= row["step_ms_p80"]
        assert row["num_tokens"] == ours["num_tokens"]
    assert ours["time_to_ours"] == 1.0
    pairs = zip(theirs["times_ms"], ours["times_ms"], strict=True)
    assert theirs["time_to_ours"] == pytest.approx(statistics.median(a / b for a, b in pairs))
    assert ours["parts"]["forward and backward"] > 0


@pytest.mark.parametrize("adapter", ["qlora", "full"])
def test_other_adapters_train_what_they_should(adapter):
    rows = step.run(tiny_case("dpo", adapter), CPU, repeats=1, seed=0, only=("logratio", "trl"))
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    assert rows["trl"]["grad_rel_err"] < (1e-2 if adapter == "qlora" else 1e-4)  # TRL makes its adapters bfloat16
    assert rows["logratio"]["ledger"]["grad_cosine"] > 1 - 1e-6


def test_trl_is_fed_the_same_tokens():
    for method in METHODS:
        case = tiny_case(method)
        window = case.window(259, 0)
        old = None
        if method == "grpo":
            old = step.old_logps(case, build("tiny", "lora", dtype=torch.float32, device=CPU), [window], 0)
        rows = trl_contestant.ROWS[method](case, window, old)
        with step.ExitStack() as stack:
            model = build("tiny", "lora", dtype=torch.float32, device=CPU)
            trl = trl_contestant.Trl(case, model, None, CPU, stack, old=old)
            batches = trl.prepare(window, len(rows))
        assert len(batches) == 1
        got = unpadded(method, batches[0])
        sides = got.values() if method != "kto" else [got["completion"]]
        seen = [scored.split() for side in sides for scored in side]
        wanted = [(e.prompt_ids, c.ids) for e in window for c in e.completions]
        assert sorted(seen) == sorted(wanted), method


def test_a_side_that_computes_something_else_is_not_timed(monkeypatch):
    other = property(lambda case: DPOLoss(beta=0.2))
    monkeypatch.setattr(StepCase, "loss", other)  # TRL keeps its own default, 0.1
    rows = step.run(tiny_case("dpo"), CPU, repeats=1, seed=0, only=("logratio", "trl"))
    assert rows["trl"]["status"] == "failed" and "its gradient differs by" in rows["trl"]["error"]
    assert "step_ms_p50" not in rows["trl"] and rows["logratio"]["status"] == "ok"


@pytest.mark.parametrize(
    ("error", "status"), [(torch.OutOfMemoryError("no room\nfor it"), "oom"), (RuntimeError("x"), "failed")]
)
def test_one_that_fails_does_not_end_the_others(monkeypatch, error, status):
    def fails(self, batch):
        raise error

    monkeypatch.setattr(trl_contestant.Trl, "backward", fails)
    rows = step.run(tiny_case("sft"), CPU, repeats=1, seed=0, only=("logratio", "trl"))
    assert rows["trl"]["status"] == status and "\n" not in rows["trl"]["error"]
    assert rows["logratio"]["status"] == "ok"


def test_contestants_share_what_is_frozen():
    model = build("tiny", "lora", dtype=torch.float32, device=CPU, lora_r=4)
    twin = share_frozen(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) and (p is q) is not p.requires_grad
    assert trained_mib(model) == sum(p.numel() for p in model.parameters() if p.requires_grad) * 16 / 2**20


def test_nf4_is_everywhere_but_in_the_head_and_its_plain_twin_computes_the_same():
    torch.manual_seed(0)
    model = build("tiny", "qlora", dtype=torch.float32, device=CPU)
    four = [name for name, m in model.named_modules() if type(m).__name__ == "Linear4bit" and "base_layer" in name]
    assert len(four) == 3 * 7  # layers x (q, k, v, o, gate, up, down)
    ids = torch.randint(256, (1, 12))
    with torch.no_grad():
        ours, twin = model(ids).logits, plain(model, torch.float32)(ids).logits
    torch.testing.assert_close(twin, ours, rtol=1e-4, atol=1e-4)


def test_the_ledger_sees_an_update_that_bfloat16_rounds_away():
    shares = {}
    for dtype in ("float32", "bfloat16"):
        case = tiny_case("sft", "full", dtype=dtype)
        model = build("tiny", "full", dtype=getattr(torch, dtype), device=CPU)
        shares[dtype] = share_changed(Ours(case, model, None, CPU), case.window(259, 0))
    assert shares["float32"] > 0.9 and shares["bfloat16"] < 0.5 * shares["float32"]


def test_difference_and_cosine_by_hand():
    a, b = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([4.0])}, {"x": torch.tensor([0.0, 0.0])}
    b["y"] = torch.tensor([4.0])
    assert difference(a, b) == 3 / 4 and cosine(a, b) == 4 / 5
    with pytest.raises(ValueError, match="gradients of different parameters"):
        difference(a, {"x": a["x"]})


def test_a_gradient_is_that_of_one_piece_and_leaves_none():
    case = tiny_case("dpo")
    ours = Ours(case, build("tiny", "lora", dtype=torch.float32, device=CPU), None, CPU)
    window = case.window(259, 0)
    first, again = gradient(ours, window), gradient(ours, window)
    assert first.keys() == {name for name, p in ours.model.named_parameters() if p.requires_grad}
    assert difference(first, again) == 0


def test_contestants_take_turns():
    calls = []
    works = {name: (lambda round_, name=name: calls.append((name, round_))) for name in "abc"}
    times = measure.interleaved(works, CPU, repeats=3, warmup=1)
    assert [len(values) for values in times.values()] == [3, 3, 3]
    assert "".join(name for name, _ in calls) == "cab" + "abc" + "bca" + "cab"
    assert [round_ for _, round_ in calls] == [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3


def test_percentiles_and_paired_ratios_by_hand():
    assert measure.percentiles([5, 1, 4, 2, 3], "t") == pytest.approx({"t_p20": 1.8, "t_p50": 3, "t_p80": 4.2})
    assert measure.percentiles([5, 1], "t") == {"t_p20": 1, "t_p50": 3, "t_p80": 5}
    assert measure.median_ratio({"a": [2, 9, 30], "b": [1, 3, 10]}, "a", "b") == 3


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


def test_a_wrong_head_has_an_error(monkeypatch):
    right = head.CONTESTANTS["eager"]
    monkeypatch.setitem(head.CONTESTANTS, "eager", right._replace(loss=lambda x: 1.01 * right.loss(x)))
    rows = head.run(head.HeadCase("x", 16, 50, 24, "float32", trainable=False), CPU, repeats=1, seed=0)
    assert rows["eager"]["grad_hidden_err"] == pytest.approx(0.01, rel=1e-3)


def test_a_run_is_recorded_and_gone_on_with(tmp_path, monkeypatch, capsys):
    ran = []

    def fake(case, device, *, repeats, seed, only):
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


def test_a_failure_makes_the_status(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "run", lambda *a, only, **k: {n: {"status": "failed", "error": "E"} for n in only})
    assert bench.main(["step", "--device", "cpu", "--results", str(tmp_path), "--only", "sft"]) == 1


def test_bad_input():
    with pytest.raises(UserError, match="no case of suite step has a name with nonsense in it"):
        bench.main(["step", "--only", "nonsense", "--device", "cpu"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: torch sees no GPU here; use --device cpu"):
            bench.main(["head", "--device", "cuda"])


def test_no_two_cases_of_a_suite_have_one_name():
    for cases in (cpu_cases(), gpu_cases(), quick_cases(), scale_cases(True), scale_cases(False)):
        names = [case.case for case in cases]
        assert len(names) == len(set(names))
    combinations = {(c.method, c.adapter, c.model) for c in gpu_cases()}
    assert len(combinations) == 5 * (3 + 3 + 2)
