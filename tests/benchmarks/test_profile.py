"""What a profile of a step says, of made-up events and of a small step on a CPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from logratio.benchmarks import profile
from logratio.benchmarks.measure import profiled
from logratio.trainers.errors import UserError

CUDA, CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


def event(name, start, end, device=CUDA, annotation=False, self_us=0):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        name=name, time_range=span, device_type=device, is_user_annotation=annotation, self_cpu_time_total=self_us
    )


def test_kernels_idle_gpu_and_host_by_hand():
    events = [
        event("gemm", 0, 3000),
        event("row", 2000, 4000),  # beside it for 1 ms
        event("gemm", 6000, 8000),
        event("cudaStreamSynchronize", 7000, 9500, CPU),
        event("aten::mm", 0, 9000, CPU),
        event("Optimizer.step#AdamW.step", 0, 10000, annotation=True),
    ]
    found = profiled.figures(events, elapsed_ms=10.0, top=1)
    assert found["gpu_busy_ms"] == 6 and found["gpu_idle"] == pytest.approx(0.4)
    assert found["host_ms"] == 7.5 and found["launches"] == 3
    assert found["kernels"] == [{"name": "gemm", "ms": 5.0, "share": 0.5, "calls": 2}]


def test_operators_and_what_lies_outside_of_them_by_hand():
    events = [
        event("autograd::engine::evaluate_function: AddmmBackward0", 0, 9000, CPU, self_us=4000),
        event("aten::linear", 0, 3000, CPU, self_us=500),
        event("aten::addmm", 500, 3000, CPU, self_us=2500),
        event("aten::addmm", 6000, 8000, CPU, self_us=2000),
    ]
    found = profiled.figures_of_cpu(events, elapsed_ms=10.0, top=1)
    assert found["host_ms"] == 5 and found["launches"] == 3
    assert found["operators"] == [{"name": "aten::addmm", "ms": 4.5, "share": 0.45, "calls": 2}]


def test_spans_that_lie_in_one_another_count_once():
    assert profiled.union([(0, 10), (2, 3), (9, 12), (20, 21)]) == 13
    assert profiled.union([]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("contestant", ["logratio", "trl"])
def test_a_step_is_profiled_and_written_down(contestant, tmp_path, capsys):
    out = tmp_path / "new" / "profile.json"
    words = ["dpo-lora-tiny-gsm8k", "--device", "cpu", "--repeats", "1", "--contestant", contestant, "--out", str(out)]
    assert profile.main(words) == 0
    found = json.loads(out.read_text())
    assert found["step_ms"] > 0 and 0 < found["host_ms"] < found["profiled_ms"]
    assert "aten::mm" in {one["name"] for one in found["operators"]}
    shown = capsys.readouterr().out
    assert "dpo-lora-tiny-gsm8k, " + contestant in shown and "| ms | share | calls | operator |" in shown


def test_a_case_that_there_is_not_is_named():
    with pytest.raises(UserError, match="no case dpo-lora; there are sft-lora-SmolLM2-135M-gsm8k, "):
        profile.main(["dpo-lora", "--device", "cpu"])
