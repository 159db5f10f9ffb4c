"""What a profile of a step says, of made-up events and of a small step on a CPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from logratio.benchmarks import profile
from logratio.benchmarks.measure import profiled
from logratio.trainers.errors import UserError

CUDA, CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


def event(name, start, end, device=CUDA, annotation=False):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)


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
    assert found["step_ms"] > 0 and found["kernels"] == [] and found["gpu_idle"] == 1
    assert found["host_ms"] == pytest.approx(found["profiled_ms"])
    assert "dpo-lora-tiny-gsm8k, " + contestant in capsys.readouterr().out


def test_a_case_that_there_is_not_is_named():
    with pytest.raises(UserError, match="no case dpo-lora; there are sft-lora-SmolLM2-135M-gsm8k, "):
        profile.main(["dpo-lora", "--device", "cpu"])
