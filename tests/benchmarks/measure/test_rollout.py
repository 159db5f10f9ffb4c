"""The suite `rollout` on the tiny model: what is timed is what is said to be."""

import dataclasses

import pytest
import torch

from logratio.benchmarks import bench
from logratio.benchmarks.measure import rollout
from logratio.benchmarks.measure.models import build
from logratio.benchmarks.measure.rollout import RolloutCase, ending, run

CASE = RolloutCase("tiny", prompts=2, group=2, tokens=5)


def test_every_contestant_samples_as_much_and_steps():
    found = run(CASE, torch.device("cpu"), repeats=1, seed=0)
    assert found.keys() == {"logratio", "trl", "transformers"}
    for name, figures in found.items():
        assert figures["tokens"] == [20] and figures["status"] == "ok" and figures["rollout_ms_p50"] > 0
        assert ("step_ms_p50" in figures) == (name != "transformers")
        if name != "transformers":
            assert figures["step_ms_p50"] > figures["rollout_ms_p50"]


def test_completions_end_at_the_rate_that_makes_their_mean_half_the_limit():
    """Of 32 completions, on average; and what is sampled in training is not touched."""
    case = dataclasses.replace(CASE, prompts=4, group=8, tokens=24, ends=True)
    (figures,) = run(case, torch.device("cpu"), repeats=1, seed=0, only=["transformers"]).values()
    assert 32 * 12 * 0.6 < figures["tokens"][0] < 32 * 12 * 1.4
    model = build("tiny", "lora", dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.tensor([[5, 6, 7]])
    plain = model(input_ids=ids).logits
    handle = ending(model, 0.25)
    assert torch.equal(model(input_ids=ids).logits, plain)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    eos = rollout.tiny_tokenizer().eos_token_id
    assert logits.softmax(-1)[..., eos].flatten().tolist() == pytest.approx([0.25] * 3, abs=1e-5)
    handle.remove()


def test_the_command_names_its_cases(capsys):
    assert bench.main(["rollout", "--device", "cpu", "--dry_run"]) == 0
    assert capsys.readouterr().out.split() == [
        "rollout-lora-SmolLM2-135M-4x8x64-limit",
        "rollout-lora-SmolLM2-135M-4x8x64-ends",
    ]
