"""Out of memory is no end: a step that did not fit is taken again in smaller micro-batches, with the same bits."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from logratio.benchmarks.peers import truths
from logratio.trainers import cli, loop, setup
from logratio.trainers.batches.values import per_example
from logratio.trainers.ground import randomness
from logratio.trainers.logs.journal import TIMED
from logratio.trainers.options import parse_train
from logratio.trainers.policy.policy import Policy
from logratio.trainers.resume import Progress
from logratio.trainers.rollout.engines.decoding import Decoder
from logratio.trainers.step import learn

BUDGET = 200 * 2**9


class Room:
    """Of a device on which a pass over more than `limit` tokens does not fit; failed: how many did not.

    where: "forward", or "backward" where the forward pass fits. until: passes that fit before. times: fail so often.
    """

    def __init__(self, limit, where="forward", after=0, times=10**6):
        self.limit, self.where, self.after, self.times, self.failed, self.passes = limit, where, after, times, 0, 0

    def check(self, tokens):
        self.passes += 1
        if tokens > self.limit and self.passes > self.after and self.failed < self.times:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    def forward(self, policy, batch):
        if self.where == "forward":
            self.check(batch.input_ids.numel())
        out = FORWARD(policy, batch)
        if self.where == "backward" and torch.is_grad_enabled():
            out.logps.register_hook(lambda grad: self.check(batch.input_ids.numel()))
        return out


FORWARD = Policy.forward


@pytest.fixture
def within(monkeypatch):
    """within(room): from here on passes need room, or none with None."""

    def use(room):
        forward = FORWARD if room is None else lambda policy, batch: room.forward(policy, batch)
        monkeypatch.setattr(Policy, "forward", forward)
        return room

    return use


REWARD = """
def digits(completion_ids, **_):
    return [sum(48 <= token < 58 for token in ids) + len(ids) / 10 for ids in completion_ids]
"""


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """trained(method, budget, options) -> (the adapter, the log without times, what was said); with dropout."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some_rewards.py").write_text(REWARD)

    def train(method, budget, options, capsys):
        folder = tmp_path / f"{method}-{len(list(tmp_path.iterdir()))}"
        words = ["train", method, "--lora_r", "4", "--lora_dropout", "0.2", "--max_steps", "3", "--batch_size", "8"]
        if method == "grpo":
            words += ["--num_generations", "4", "--max_completion_length", "12", "--beta", "0.04"]
            words += ["--reward_funcs", "some_rewards:digits"]
        else:
            rows = truths.random_rows(method, 7, 20)
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            words += ["--dataset_name", "rows.jsonl"]
        words += ["--micro_batch_tokens", str(budget), "--output_dir", str(folder), "--learning_rate", "1e-3"]
        assert cli.main([*words, *options.split()]) == 0, capsys.readouterr().err
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for row in log:
            for name in TIMED:
                row.pop(name, None)
        return load_file(folder / "adapter_model.safetensors"), log, capsys.readouterr().out

    return train


def same_bits(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


PAIRS = "--loss_type aot sft --loss_weights 1 0.5"
ROLLOUTS = "--num_iterations 2 --top_entropy_quantile 0.5 --max_steps 4"
EVERY = [("dpo", PAIRS, "backward"), ("kto", "--eval_size 4", "forward")]
EVERY += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in [
        ("grpo", ROLLOUTS, "backward"),
        ("dpo", PAIRS, "forward"),
        ("kto", "--eval_size 4", "backward"),
        ("grpo", ROLLOUTS, "forward"),
        ("sft", "--eval_size 4", "backward"),
        ("dpo", "--precompute_ref_log_probs", "forward"),
        ("kto", "--sync_ref_model --ref_model_sync_steps 1", "forward"),
        ("kto", "--precompute_ref_log_probs --loss_type bco", "forward"),
        ("orpo", "", "backward"),
        ("cpo", "--loss_type simpo", "forward"),
        ("tpo", "--loss_type tpo-l", "forward"),
        ("grpo", "--reward_kl_coef 0.1", "forward"),
    ]
]


@pytest.mark.parametrize(("method", "options", "where"), EVERY)
def test_a_smaller_budget_is_found_and_gives_its_own_bits(method, options, where, within, trained, capsys):
    """As if it had been given from the start: weights, losses and evaluation; dropout draws what it would have."""
    room = within(Room(210, where))
    adapter, log, said = trained(method, BUDGET, options, capsys)
    assert 1 <= room.failed <= (5 if "precompute" in options else 3), "it is not found in steps that divide nothing"
    assert f"out of memory with --micro_batch_tokens {BUDGET}; " in said and " 200 from here on, which" in said
    within(None)
    wanted, wanted_log, said = trained(method, 200, options, capsys)
    assert "out of memory" not in said
    assert same_bits(adapter, wanted) and log == wanted_log
    if method == "dpo":
        whole, _, _ = trained(method, BUDGET, options, capsys)
        assert not same_bits(wanted, whole), "the cut draws other dropout, so equal bits say something"


def run_of(method, folder, *words):
    """A run that the command line would build."""
    return setup.build(parse_train([method, "--lora_r", "4", "--output_dir", str(folder), *words]))


def test_what_was_done_of_the_step_is_dropped(within, tmp_path):
    """The second backward pass of the second step fails once: gradients of the first are not counted twice, and the
    step packed ahead is packed again."""
    words = ["--batch_size", "8", "--max_steps", "4", "--micro_batch_tokens", "40", "--lora_dropout", "0.2"]
    first = within(Room(0, "backward"))
    first.times = 0
    run = run_of("sft", tmp_path / "one", *words)
    loop.train_run(run, until=lambda run, row: row["step"] == 1, quiet=True)
    per_step = first.passes
    assert per_step > 1

    weights, notes = [], []
    for fails in (True, False):
        room = within(Room(0, "backward", after=per_step + 1, times=1 if fails else 0))
        run = run_of("sft", tmp_path / str(fails), *words)

        def smaller(run, row, fails=fails):
            if row["step"] == 1 and not fails:
                run.step.micro_batch_tokens = 20
            return False

        taking = run.step.memory.take
        run.step.memory.take = lambda taking=taking: notes.append(taking()) or notes[-1]
        loop.train_run(run, until=smaller, quiet=True)
        assert room.failed == fails and run.step.micro_batch_tokens == 20
        weights.append({n: p.detach().clone() for n, p in run.policy.named_parameters() if p.requires_grad})
    assert same_bits(*weights)
    line = "out of memory with --micro_batch_tokens 40; 20 from here on, which changes nothing else"
    assert [note for note in notes if note] == [[line]]


def test_later_steps_on_the_same_rollouts_keep_what_they_are_compared_with(tmp_path):
    words = ["--batch_size", "4", "--num_generations", "3", "--max_completion_length", "8", "--num_iterations", "2"]
    run = run_of("grpo", tmp_path, *words, "--beta", "0.1", "--micro_batch_tokens", "120")
    window = next(loop.steps(run, Progress()))
    learn(run.step, window)
    before = values_of(window)
    for parameter in run.trained:
        parameter.data += 0.1
    run.step.micro_batch_tokens = 24
    learn(run.step, window)
    after = values_of(window)
    assert len(window.micros) > 4 and max(m.batch.input_ids.numel() for m in window.micros) <= 24
    assert before.keys() == after.keys() and len(before) == 2 * 12
    assert all(torch.equal(before[key], after[key]) for key in before)
    run.step.fill_old(window.micros)
    assert any(not torch.equal(before[key], value) for key, value in values_of(window).items())
    assert [m.budget for m in window.micros] == [24] * len(window.micros) and window.taken == 2


def values_of(window):
    return {
        (name, id(completion)): values
        for micro in window.micros
        for name in ("old", "ref")
        for example, parts in per_example(micro.batch, getattr(micro, name))
        for completion, values in zip(example.completions, parts, strict=True)
    }


def test_random_states_come_back():
    """As they are, and by way of JSON."""
    states = randomness.random_states(torch.device("cpu"))
    plain = json.loads(json.dumps(randomness.as_json(states)))
    drawn = [(random.random(), np.random.rand(), float(torch.rand(()))) for _ in range(2)]
    randomness.set_random_states(states, torch.device("cpu"))
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == drawn[0] != drawn[1]
    randomness.set_random_states(randomness.from_json(plain), torch.device("cpu"))
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == drawn[0]


ALONE = {
    "sft": "--max_length, ",
    "dpo": "--max_length, ",
    "listwise": "--max_length, ",
    "grpo": "--max_length or --max_completion_length, ",
}


@pytest.mark.parametrize("method", ALONE)
def test_an_example_that_does_not_fit_alone_is_named(method, within, tmp_path, capsys):
    """At once where nothing can be divided; a group of rollouts is divided first."""
    rows = {
        "sft": {"prompt": "1+1=", "completion": "2"},
        "dpo": {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
        "listwise": {"prompt": "1+1=", "completions": ["2", "3", "4"], "rewards": [1, 0, 0]},
        "grpo": {"prompt": "1+1=", "answer": "2"},
    }
    long = {"prompt": "1+" * 40}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(rows[method] | more) + "\n" for more in ({}, {}, long, {})))
    room = within(Room(60))
    words = ["train", method, "--lora_r", "2", "--dataset_name", str(path), "--batch_size", "4", "--max_steps", "1"]
    if method == "grpo":
        words += ["--num_generations", "2", "--max_completion_length", "4"]
    budget = "64" if method != "grpo" else "400"
    assert cli.main([*words, "--micro_batch_tokens", budget, "--output_dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip()
    begin, end = error.split(" tokens, ")
    assert begin.startswith("logratio: step 1: row 2 of the data set alone, " if method != "grpo" else "logratio: ")
    assert "row 2 of the data set alone" in begin and end.startswith(
        f"does not fit into memory: lower {ALONE[method]}add --gradient_checkpointing, train adapters (--lora_r 16)"
    )
    assert room.failed == 1 if method != "grpo" else room.failed > 1
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_no_micro_batch_is_about_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    def step(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert cli.main(["train", "sft", "--lora_r", "2", "--max_steps", "1", "--output_dir", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip() == (
        "logratio: out of memory, and not in a pass that smaller micro-batches would mend but with the model's weights "
        "or the optimizer's state (CUDA out of memory. Tried to allocate 2 GiB): "
        "train adapters (--lora_r 16) of 4-bit weights (--load_in_4bit), or take a GPU with more memory"
    )


def test_completions_are_generated_in_as_many_as_fit(tmp_path, monkeypatch, capsys):
    """And say the same: float64 leaves no token to chance."""
    words = ["--batch_size", "4", "--num_generations", "3", "--max_completion_length", "6", "--max_steps", "2"]
    run = run_of("grpo", tmp_path / "one", *words)
    run.policy.double()
    wanted = run.rollouts(run.data.train[:4])
    advance, asked = Decoder.advance, []

    def small(decoder):
        asked.append(len(decoder.live))
        if len(decoder.live) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        advance(decoder)

    monkeypatch.setattr(Decoder, "advance", small)
    room = 3
    got = run.rollouts(run.data.train[:4])
    assert [[c.ids for c in e.completions] for e in got.examples] == [
        [c.ids for c in e.completions] for e in wanted.examples
    ]
    assert asked[:2] == [12, 6] and max(asked[2:]) == 3 and run.rollouts.engine.rows == 3
    assert run.rollouts.after(1) == [
        "out of memory with 12 completions generated at a time; 6 from here on",
        "out of memory with 6 completions generated at a time; 3 from here on",
    ]
    room = 0
    assert cli.main(["train", "grpo", *words, "--output_dir", str(tmp_path / "two")]) == 1
    assert "logratio: step 1: generating one completion of up to 6 tokens does not fit into memory: lower" in (
        capsys.readouterr().err
    )
