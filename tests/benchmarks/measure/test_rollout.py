"""The suite `rollout` on the tiny model: what is timed is what is said to be."""

import dataclasses
import types
from contextlib import ExitStack

import pytest
import torch
import transformers

from logratio.benchmarks import bench
from logratio.benchmarks.measure import clock, rollout, rollout_case, token
from logratio.benchmarks.measure.models import build
from logratio.benchmarks.measure.rollout import ending, run
from logratio.benchmarks.measure.rollout_case import RolloutCase
from logratio.benchmarks.memory.shapes import shape

CASE = RolloutCase("tiny", prompts=2, group=2, tokens=5)
CPU = torch.device("cpu")


def test_every_contestant_samples_as_much_and_steps():
    found = run(CASE, CPU, repeats=2, seed=0)
    assert found.keys() == {"logratio", "trl", "transformers"}
    for name, figures in found.items():
        assert figures["sampled_tokens"] == [20, 20] and figures["status"] == "ok" and figures["rollout_ms_p50"] > 0
        assert figures["token_ms_p50"] == figures["rollout_ms_p50"] / 5 and "bandwidth_limit_ms" not in figures
        assert ("step_ms_p50" in figures) == (name != "transformers")
        if name != "transformers":
            assert all(a < b for a, b in zip(figures["rollout_times_ms"], figures["times_ms"], strict=True))


def test_words_that_end_a_published_models_texts_end_nothing_here(monkeypatch):
    def published(*given, **options):
        model = build(*given, **options)
        model.generation_config.eos_token_id = list(range(200))
        return model

    monkeypatch.setattr(rollout, "build", published)
    for name, figures in run(CASE, CPU, repeats=1, seed=0).items():
        assert figures["sampled_tokens"] == [20], name


def test_what_a_contestant_left_to_the_device_is_not_in_the_next_ones_time(monkeypatch):
    """The device is drained before and after each turn that is timed, and the order rotates."""
    said = []
    monkeypatch.setattr(clock, "wait", lambda device: said.append("wait"))
    for name in rollout.MAKES:
        monkeypatch.setitem(rollout.MAKES, name, lambda *given, name=name: Silent(name, said))
    run(CASE, CPU, repeats=2, seed=0)
    built, turns = said[:3], said[3:]
    assert built == ["logratio", "trl", "transformers"], "a turn that is not timed"
    order = ["logratio", "trl", "transformers", "trl", "transformers", "logratio"]
    assert turns == [word for name in order for word in ("wait", name, "wait")]


class Silent:
    """A contestant that says when it is its turn."""

    learns = True

    def __init__(self, name, said):
        self.name, self.said = name, said

    def turn(self):
        self.said.append(self.name)
        return rollout.Sampled(1.0, 1)


def test_one_that_fails_does_not_end_the_others(monkeypatch):
    def fails(*given):
        raise ImportError("another version of TRL")

    monkeypatch.setitem(rollout.MAKES, "trl", fails)
    found = run(CASE, CPU, repeats=1, seed=0)
    assert found["trl"] == {"status": "failed", "error": "ImportError: another version of TRL"}
    assert found["logratio"]["status"] == found["transformers"]["status"] == "ok"


def test_our_step_is_that_of_training():
    """With what its metrics need, and adapters that changed; in training mode, as TRL's."""
    with ExitStack() as stack:
        model = build("tiny", "lora", dtype=torch.float32, device=CPU)
        ours = rollout.Ours(CASE, model, CPU, stack)
        before = [p.detach().clone() for p in model.parameters()]
        assert ours.step.policy.model.training and "entropy" in ours.step.policy.stats
        ours.turn()
        trained = [p.requires_grad for p in model.parameters()]
        changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert any(changed) and not any(c and not t for c, t in zip(changed, trained, strict=True))


@pytest.mark.slow
def test_completions_end_at_the_rate_that_makes_their_mean_half_the_limit():
    """Of each contestant's 32, on average; and what is sampled in training is not touched."""
    case = dataclasses.replace(CASE, prompts=4, group=8, tokens=24, ends=True)
    for figures in run(case, CPU, repeats=1, seed=0).values():
        assert 32 * 12 * 0.6 < figures["sampled_tokens"][0] < 32 * 12 * 1.4
    model = build("tiny", "lora", dtype=torch.float32, device=CPU)
    ids = torch.tensor([[5, 6, 7]])
    plain = model(input_ids=ids).logits
    handle = ending(model, 0.25)
    assert torch.equal(model(input_ids=ids).logits, plain)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    eos = rollout.tiny_tokenizer().eos_token_id
    assert logits.softmax(-1)[..., eos].flatten().tolist() == pytest.approx([0.25] * 3, abs=1e-5)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain)
        handle = ending(model, None)
        assert model(input_ids=ids).logits[..., eos].eq(-torch.inf).all()
    handle.remove()


def test_a_token_reads_weights_and_what_is_kept(monkeypatch):
    """Qwen2.5-0.5B in bfloat16, whose embedding is its head; of 8 x 8 completions, in the middle of 128 tokens."""
    (case, _) = rollout_case.cases(gpu=True)
    with torch.device("meta"):
        config = shape(case.model)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = 2 * (151_936 * 896 + 24 * 14_912_384 + 896)
    kept = 64 * ((125 + 92 + 93 + 83) / 4 + 64) * 24 * 2 * 2 * 64 * 2
    assert token.token_bytes(case, model) == pytest.approx(weights + kept)
    h200 = types.SimpleNamespace(name="NVIDIA H200", total_memory=150 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    limit = token.bandwidth_limit_ms(case, model, torch.device("cuda"))
    assert limit == pytest.approx((weights + kept) / 4.8e12 * 1e3) and 0.2 < limit < 0.3


def test_graphs_and_the_time_between_them_are_on_the_gpus_clock(monkeypatch):
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, later):
            return later.at - self.at

    class Graph:
        def replay(self):
            now[0] += 10

    def turn():
        for wait in (2, 3, 400, 2):
            Graph().replay()
            now[0] += wait

    for name, fake in (("Event", Event), ("CUDAGraph", Graph), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, fake)
    assert token.launched(turn) == {"graph_ms_p50": 10, "host_ms_per_token": 3}
    assert token.launched(lambda: None) == {}


def test_the_command_names_its_cases(capsys):
    assert bench.main(["rollout", "--device", "cpu", "--dry_run"]) == 0
    assert capsys.readouterr().out.split() == [
        "rollout-lora-SmolLM2-135M-4x8x64-limit",
        "rollout-lora-SmolLM2-135M-4x8x64-ends",
    ]
