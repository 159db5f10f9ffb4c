"""The suite of the host's time: both sides of every method are measured, beside the plain model on the same pairs."""

import time

import pytest
import torch

from logratio.benchmarks import bench
from logratio.benchmarks.measure.clock import cpu_ms, interleaved
from logratio.benchmarks.measure.steps import host
from logratio.benchmarks.measure.steps.step_cases import METHODS
from logratio.trainers.data.examples import Completion, Example

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_counted_in_passes_of_the_plain_model(method, monkeypatch):
    monkeypatch.setattr(host, "LAYERS", 2)
    case = next(case for case in host.cases() if case.method == method)
    threads = torch.get_num_threads()
    rows = host.run(case, CPU, repeats=2, seed=0)
    assert torch.get_num_threads() == threads
    assert {name: row["status"] for name, row in rows.items()} == {
        "logratio": "ok",
        "trl": "ok",
        "trl+liger": "refused",
    }
    for name in ("logratio", "trl"):
        row = rows[name]
        assert len(row["times_ms"]) == 2 and row["units"] > 0 and row["passes_units"] > 0 and row["plain_ms_p50"] > 0
        assert min(row["times_ms"]) / row["plain_ms_p50"] < 3 * row["units"]
    assert rows["logratio"]["time_to_ours"] == 1


def test_its_cases_are_those_of_the_command(capsys):
    assert bench.main(["host", "--dry-run"]) == 0
    assert capsys.readouterr().out.split() == [f"{method}-lora-32x64-short" for method in METHODS]


def test_the_plain_model_sees_both_completions_padded():
    pairs = [Example([1, 2], [Completion([3]), Completion([4, 5])]), Example([6], [Completion([7])])]
    assert host.padded(pairs).tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [6, 7, 0, 0], [6, 7, 0, 0]]


def test_the_clock_of_the_process_does_not_count_what_it_waits_for():
    times = interleaved({"wait": lambda _: time.sleep(0.2)}, CPU, repeats=1, warmup=0, clock=cpu_ms)
    assert times["wait"][0] < 100
