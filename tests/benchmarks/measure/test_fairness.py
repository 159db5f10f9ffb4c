"""What would be unfair: a setting on one side alone, Liger in everybody, a contestant that takes others with it."""

import pytest
import torch

from logratio.benchmarks import bench
from logratio.benchmarks.measure.models import build
from logratio.benchmarks.measure.steps import contestants, ledger, step, trl_contestant
from logratio.benchmarks.measure.steps.contestants import share_frozen, trainable_copy
from logratio.benchmarks.measure.steps.step_cases import METHODS, StepCase
from logratio.benchmarks.measure.steps.workloads import Lengths
from logratio.losses import DPOLoss

CPU = torch.device("cpu")


def tiny_case(method="dpo", adapter="lora", **changes) -> StepCase:
    lengths = Lengths(6, 9, 0.4, 0.4, max_length=32)
    options = {"dtype": "float32", "num_generations": 3, "lengths": lengths, "lora_r": 4} | changes
    return StepCase(method, adapter, "tiny", "short", 2 if method == "grpo" else 4, 64, **options)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_is_on_on_both_sides_or_on_neither(method):
    for on in (False, True):
        case = tiny_case(method, gradient_checkpointing=on)
        model = build("tiny", "lora", dtype=torch.float32, device=CPU, lora_r=4)
        window = case.window(259, 0)
        old = step.old_logps(case, model, [window], 0)
        with step.ExitStack() as stack:
            for name in ("logratio", "trl"):
                one = step.make(name, case, model, CPU, stack, old)
                layer, calls = one.model.get_base_model().model.layers[0].self_attn, []
                layer.register_forward_pre_hook(lambda *a, calls=calls: calls.append(torch.is_grad_enabled()))
                one.backward(one.prepare(window, len(window) * (3 if method == "grpo" else 1)))
                micros = len(one.micro_batches(window)) if name == "logratio" else 1
                assert sum(calls) == micros * (2 if on else 1), (name, on)  # once more in backward


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_ligers_layers_are_in_its_contestant_alone(adapter):
    pytest.importorskip("liger_kernel")
    model = build("tiny", adapter, dtype=torch.float32, device=CPU, lora_r=4)
    names = trl_contestant.modeling(model)
    before = dict(names)
    case = tiny_case("dpo", adapter)
    with step.ExitStack() as stack:
        own, ref_model = trainable_copy(model, adapter), share_frozen(model) if adapter == "full" else None
        liger = trl_contestant.Trl(case, own, ref_model, CPU, stack, liger=True)
        assert "apply_rotary_pos_emb" in liger.names and all(names[k] is v for k, v in before.items())
        seen = []
        liger.trainer.training_step = lambda *a: seen.append(names["apply_rotary_pos_emb"])
        liger.backward(liger.prepare(case.window(259, 0)))
        assert set(seen) == {liger.names["apply_rotary_pos_emb"]}
        assert all(names[k] is v for k, v in before.items())
    later = build("tiny", adapter, dtype=torch.float32, device=CPU)
    assert not [m for m in later.modules() if "Liger" in type(m).__name__]


@pytest.mark.parametrize("good_calls", [1, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_one_that_runs_out_of_memory_late_costs_the_others_nothing(monkeypatch, good_calls):
    backward, calls = trl_contestant.Trl.backward, []

    def fails_later(self, *batches):
        calls.append(1)
        if len(calls) > good_calls:
            raise torch.OutOfMemoryError("no room")
        backward(self, *batches)

    monkeypatch.setattr(trl_contestant.Trl, "backward", fails_later)
    rows = step.run(tiny_case("sft"), CPU, repeats=3, seed=0, only=("logratio", "trl"))
    assert rows["trl"]["status"] == "oom" and "step_ms_p50" not in rows["trl"]
    assert rows["logratio"]["status"] == "ok" and len(rows["logratio"]["times_ms"]) == 3


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("no such kernel")])
def test_a_truth_that_there_is_not_costs_its_figures_alone(monkeypatch, error):
    def none(*args):
        raise error

    monkeypatch.setattr(step, "truth", none)
    rows = step.run(tiny_case("sft"), CPU, repeats=1, seed=0, only=("logratio", "trl"))
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert [set(row["ledger"]) for row in rows.values()] == [{"share_changed"}] * 2
    assert {row["no_truth"] for row in rows.values()} == {f"{type(error).__name__}: {error}"}


def test_a_truth_that_nobody_asked_for_is_not_computed(monkeypatch):
    monkeypatch.setattr(step, "truth", lambda *args: pytest.fail("it was computed"))
    rows = step.run(tiny_case("sft"), CPU, repeats=1, seed=0, only=("logratio",), with_truth=False)
    assert rows["logratio"]["status"] == "ok" and "no_truth" not in rows["logratio"]
    assert set(rows["logratio"]["ledger"]) == {"share_changed"}


def test_of_a_large_model_there_is_none(monkeypatch):
    monkeypatch.setattr(step, "LARGEST_TRUTH", 1000)
    monkeypatch.setattr(step, "truth", lambda *args: pytest.fail("it was computed"))
    rows = step.run(tiny_case("sft"), CPU, repeats=1, seed=0, only=("logratio",))
    assert rows["logratio"]["status"] == "ok" and "billion parameters is too large" in rows["logratio"]["no_truth"]


def test_the_parts_of_a_step_cost_no_more_than_their_figure(monkeypatch):
    monkeypatch.setattr(contestants.Ours, "timed_parts", lambda *args: 1 / 0)
    rows = step.run(tiny_case("sft"), CPU, repeats=1, seed=0, only=("logratio",))
    row = rows["logratio"]
    assert row["status"] == "ok" and row["step_ms_p50"] > 0
    assert "parts" not in row and row["no_parts"] == "ZeroDivisionError: division by zero"


def test_the_truth_takes_no_shared_prompts_and_no_kernels(monkeypatch):
    asked = []
    monkeypatch.setattr(contestants, "share_prompts", lambda policy: asked.append(policy))
    case = tiny_case("dpo")
    model = step.build("tiny", "lora", dtype=torch.float32, device=CPU)
    ledger.truth(case, model, case.window(64, 0)[:2], None)
    assert not asked
    contestants.Ours(case, contestants.trainable_copy(model, "lora"), None, CPU)
    assert len(asked) == 1


def test_the_exact_model_leaves_the_contestants_accelerators_as_they_are(monkeypatch):
    seen = []
    monkeypatch.setattr(step, "compare", lambda case, exact, trial, rows, running: seen.extend(
        one.trainer.accelerator.mixed_precision for name, one in running.items() if name == "trl"))  # fmt: skip
    options = trl_contestant.constructed
    monkeypatch.setattr(trl_contestant, "constructed", lambda method, model, tokenizer, data, given, **more: options(
        method, model, tokenizer, data, given | {"bf16": True}, **more))  # fmt: skip
    step.run(tiny_case("sft", dtype="bfloat16"), CPU, repeats=1, seed=0, only=("logratio", "trl"))
    assert seen == ["bf16"]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "adapter"), [("bfloat16", "lora"), ("float32", "qlora")])
def test_where_rounding_is_larger_another_loss_is_still_not_timed(monkeypatch, dtype, adapter):
    rows = step.run(tiny_case("dpo", adapter, dtype=dtype), CPU, repeats=1, seed=0, only=("logratio", "trl"))
    assert rows["trl"]["status"] == "ok" and 1e-4 < rows["trl"]["grad_rel_err"] < 0.1
    monkeypatch.setattr(StepCase, "loss", property(lambda case: DPOLoss(beta=0.2)))
    rows = step.run(tiny_case("dpo", adapter, dtype=dtype), CPU, repeats=1, seed=0, only=("logratio", "trl"))
    assert rows["trl"]["status"] == "failed" and "step_ms_p50" not in rows["trl"]


def test_what_failed_before_is_tried_again_behind_the_rest(tmp_path, monkeypatch):
    ran = []

    def fake(case, device, *, only, **more):
        ran.append(case.method)
        if case.method == "sft":
            raise RuntimeError("no\nsuch thing")
        return {name: {"status": "ok", "step_ms_p50": 1.0, "parts": {"a": float("inf")}} for name in only}

    monkeypatch.setattr(step, "run", fake)
    words = ["step", "--device", "cpu", "--results", str(tmp_path), "--only", "sft", "dpo"]
    assert bench.main([*words, "--repeats", "1"]) == 1 and bench.main([*words, "--repeats", "2"]) == 1
    assert ran == ["sft", "dpo", "dpo", "sft"]


def test_a_case_that_a_run_was_ended_in_comes_last(tmp_path, monkeypatch):
    ran = []

    def fake(case, device, *, only, **more):
        ran.append(case.method)
        if len(ran) == 1:
            raise KeyboardInterrupt
        return {name: {"status": "ok", "step_ms_p50": 1.0} for name in only}

    monkeypatch.setattr(step, "run", fake)
    words = ["step", "--device", "cpu", "--results", str(tmp_path), "--only", "sft", "dpo"]
    with pytest.raises(KeyboardInterrupt):
        bench.main(words)
    assert bench.main(words) == 0 and ran == ["sft", "dpo", "sft"]
    assert [file.name for file in tmp_path.iterdir()] == ["cpu.jsonl"]
