"""What was sampled reaches the loss: the engine's log-probabilities beside those of the pass that is trained."""

import dataclasses
import json

import pytest
import torch

from logratio.trainers import cli, loop, setup
from logratio.trainers.batches.packing import pack
from logratio.trainers.batches.values import behavior_of
from logratio.trainers.data.examples import Completion, Example
from logratio.trainers.options import parse_train
from logratio.trainers.rollout.sets.windows import roll_out

WORDS = ["--num_generations", "3", "--max_completion_length", "6", "--batch_size", "4", "--max_steps", "2"]


GRADED = ["--reward_funcs", "logratio.trainers.rollout.text_rewards:length_reward"]


def run_of(folder, *words):
    return setup.build(parse_train(["grpo", "--output_dir", str(folder), *WORDS, *words]))


def row_of(run):
    window = roll_out(run.rollouts, run.step, run.data.train[:4])
    result = run.step(window.micros, run.step.totals(window.examples, window.micros, True), backward=False)
    return result.reduced(run.accelerator), window


CUT = ["--temperature", "0.7", "--micro_batch_tokens", "40"]
MASK = ["--top_k", "5", "--top_p", "0.9", "--min_p", "0.05", "--keep_sampling_mask", "--micro_batch_tokens", "40"]


@pytest.mark.parametrize("words", [[], ["--lora_r", "2"], CUT, MASK], ids=["whole", "lora", "cut", "mask"])
def test_on_policy_the_sampler_said_what_the_trainer_says(tmp_path, words):
    """In float32: to its rounding, in every cut; so that no correction changes anything."""
    run = run_of(tmp_path, *words)
    for name, parameter in run.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    row, window = row_of(run)
    assert window.micros[0].behavior.dtype == torch.float32
    assert row["sampling/logp_diff_max"] < 1e-5 and row["sampling/ratio_mean"] == pytest.approx(1, abs=1e-5)
    timed = {name: float(mean.total / mean.count) for name, mean in window.metrics.items() if "rollout_" in name}
    assert timed.keys() == {"rollout_ms", "rollout_tokens_per_s"} and min(timed.values()) > 0


def test_another_sampler_shows(tmp_path):
    """What is sampled cut off is not what is trained: the difference is logged, and corrected where asked for."""
    words = ["--top_k", "2", *GRADED]
    row, _ = row_of(run_of(tmp_path, *words))
    assert row["sampling/logp_diff_mean"] > 0.01 and row["sampling/ratio_max"] <= 1
    low = str(row["sampling/ratio_mean"])
    again, _ = row_of(run_of(tmp_path, *words, "--sampling_correction", "token_mask", "--sampling_clip_min", low))
    assert 0 < again["sampling/masked_mean"] < 1 and again["loss"] != row["loss"]


def test_a_mask_that_nothing_is_cut_by_is_refused(tmp_path, capsys):
    assert cli.main(["train", "grpo", "--keep_sampling_mask", "--output_dir", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip()
    assert said == "logratio: --keep_sampling_mask is read only with --top_p below 1, --top_k or --min_p"


def test_a_cut_window_keeps_what_was_sampled():
    """Places follow the scored tokens, whatever else is in the batch and however long what is not scored is."""
    one = Completion([5, 6, 7], None, behavior=[-1.0, -2.0, -3.0])
    two = Completion([8, 9, 9, 9], [False, True, False, False], behavior=[-4.0, -5.0, -6.0, -7.0])
    cut = Completion([4] * 9, [False] * 9, behavior=[-8.0] * 9)
    (batch,) = pack([Example([1], [one, two, cut])], 1000, shared=True)
    assert behavior_of(batch).tolist() == [[-1.0, -2.0, -3.0], [0.0, -5.0, 0.0], [0.0, 0.0, 0.0]]
    unknown = Example([1], [one, dataclasses.replace(two, behavior=None)])
    assert behavior_of(pack([unknown], 1000)[0]) is None


def test_a_window_that_goes_on_has_what_was_sampled(tmp_path):
    """A checkpoint between the steps on one window holds it: the same bits as without a stop."""
    words = ["train", "grpo", *WORDS, "--max_steps", "4", "--num_iterations", "2", "--lora_r", "2"]
    words += ["--sampling_correction", "token_truncate", "--top_p", "0.5", "--keep_sampling_mask", *GRADED]
    assert cli.main([*words, "--output_dir", str(tmp_path / "whole")]) == 0
    assert cli.main([*words, "--output_dir", str(tmp_path / "cut"), "--save_steps", "1"]) == 0
    for step in (2, 3, 4):
        (tmp_path / "cut" / f"checkpoint-{step}").rename(tmp_path / f"later-{step}")
    assert cli.main([*words, "--output_dir", str(tmp_path / "cut"), "--save_steps", "1",
                     "--resume_from_checkpoint", "latest"]) == 0  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows)
    one, other = ((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("whole", "cut"))
    assert one.rpartition("hash")[2] == other.rpartition("hash")[2]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--load_in_4bit"]], ids=["lora", "qlora"])
def test_a_thousand_updates_leave_what_is_frozen_to_the_bit(tmp_path, words):
    """Adapters are never merged into it, and the last step's sampler is the policy of the last step."""
    small = ["--batch_size", "1", "--num_generations", "2", "--max_completion_length", "4", "--max_steps", "1000"]
    small += [*GRADED, "--learning_rate", "1e-3"]
    run = setup.build(parse_train(["grpo", "--lora_r", "2", *small, *words, "--output_dir", str(tmp_path / "out")]))
    frozen = {name: p.detach().clone() for name, p in run.policy.named_parameters() if not p.requires_grad}
    trained = {name: p.detach().clone() for name, p in run.policy.named_parameters() if p.requires_grad}
    loop.train_run(run)
    now = dict(run.policy.named_parameters())
    assert frozen and all(torch.equal(now[name], before) for name, before in frozen.items())
    assert not any(torch.equal(now[name], before) for name, before in trained.items())
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 1000 and last["sampling/logp_diff_mean"] < 1e-6
