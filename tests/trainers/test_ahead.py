"""The next step is packed while this one computes: in the loop, and in what is measured of it."""

import types

import pytest
import torch

from logratio.benchmarks.measure.steps.contestants import Ours
from logratio.benchmarks.measure.steps.step import build_of, step_of
from logratio.benchmarks.measure.steps.step_cases import StepCase
from logratio.benchmarks.measure.steps.workloads import Lengths
from logratio.trainers import cli
from logratio.trainers.layers.casts import stacked
from logratio.trainers.loop import Ahead
from logratio.trainers.step import Step


@pytest.fixture
def events(monkeypatch):
    """What happened: "(" and ")" around a step's computing, "p" where one is packed."""
    seen = []
    call, cut = Step.__call__, Step.micro_batches

    def computing(self, *args, **kwargs):
        seen.append("(")
        result = call(self, *args, **kwargs)
        seen.append(")")
        return result

    def packing(self, *args, **kwargs):
        seen.append("p")
        return cut(self, *args, **kwargs)

    monkeypatch.setattr(Step, "__call__", computing)
    monkeypatch.setattr(Step, "micro_batches", packing)
    return seen


@pytest.mark.parametrize(("method", "order"), [("dpo", "p(p)(p)()"), ("kto", "p(p)(p)()"), ("grpo", "p()p()p()")])
def test_the_loop_packs_the_next_step_in_this_one_but_for_what_is_sampled(events, method, order, tmp_path):
    words = ["--lora_r", "2", "--batch_size", "2", "--max_steps", "3", "--output_dir", str(tmp_path / "out")]
    if method == "grpo":
        words += ["--num_generations", "2", "--max_completion_length", "4"]
    assert cli.main(["train", method, *words]) == 0
    assert "".join(events) == order


@pytest.mark.parametrize(("method", "order"), [("dpo", "p(p)(p)(p)"), ("grpo", "p()p()p()")])
def test_so_does_what_is_measured(events, method, order):
    lengths = Lengths(6, 9, 0.4, 0.4, max_length=32)
    case = StepCase(method, "lora", "tiny", "short", 2, 64, dtype="float32", num_generations=2, lengths=lengths)
    cpu = torch.device("cpu")
    ours = Ours(case, build_of(case, cpu, 0), None, cpu)
    if method == "grpo":
        ours.old = lambda batch: None  # rollouts of the policy as it is
    step = step_of(ours, [ours.prepare(case.window(259, seed)) for seed in (0, 1)])
    for round_ in range(3):
        step(round_)
    assert "".join(events) == order


def test_what_packing_raises_is_raised_when_it_is_asked_for():
    first = types.SimpleNamespace(examples=[])

    def source():
        yield first
        raise ValueError("a bad row")

    windows = Ahead(source())
    assert next(windows) is first
    windows.prepare()
    with pytest.raises(ValueError, match="a bad row"):
        next(windows)
    with pytest.raises(StopIteration):
        next(windows)


def test_casts_are_kept_while_a_step_computes_and_not_while_the_next_is_prepared():
    """What is sampled for the next one may be captured in graphs, which read the tensors that they were captured on."""
    case = StepCase("dpo", "lora", "tiny", "short", 2, 64, dtype="float32", lengths=Lengths(6, 9, 0.4, 0.4))
    cpu = torch.device("cpu")
    ours = Ours(case, build_of(case, cpu, 0), None, cpu)
    weight, seen = torch.ones(2, 2), []

    def keeps(*_):
        seen.append(stacked([weight], torch.bfloat16) is stacked([weight], torch.bfloat16))

    ours.policy.register_forward_pre_hook(keeps)
    window = case.window(259, 0)
    micros = ours.step.micro_batches(window)
    ours.step(micros, ours.step.totals(window, micros), meanwhile=keeps)
    assert len(seen) > 2 and all(seen[:-1]) and not seen[-1]
