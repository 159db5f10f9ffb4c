"""Rollouts of several steps: sampled at once, dealt to the steps in TRL's order, compared with what sampled them."""

import json
import shutil

import pytest
import torch

from logratio.trainers import cli, loop, setup
from logratio.trainers.batches.values import by_completion
from logratio.trainers.options import parse_train
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer
from logratio.trainers.resume import Progress, restore
from logratio.trainers.rollout.engines.background import Begun
from logratio.trainers.rollout.engines.in_process import InProcess
from logratio.trainers.step import cut_again, learn

ROWS = [{"prompt": f"{i}+1="} for i in range(8)]
GRADED = ["--reward_funcs", "logratio.trainers.rollout.text_rewards:length_reward"]


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """run_of(*words) -> a run on eight rows in their order, two prompts of two completions a step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def build(*words):
        given = ["grpo", "--dataset_name", "rows.jsonl", "--no-shuffle", "--batch_size", "2", "--num_generations", "2"]
        given += ["--max_completion_length", "4", "--max_steps", "7", "--lora_r", "2", "--output_dir", "out", *GRADED]
        return setup.build(parse_train([*given, *words]))

    return build


def taken(run, steps, progress=None):
    """The windows of so many steps, as the loop asks for them, each with how many sets had been sampled."""
    progress, found, sets = progress or Progress(), [], []
    sample = run.rollouts.sample
    run.rollouts.sample = lambda *given: sets.append(1) or sample(*given)
    windows = loop.steps(run, progress)
    for _ in range(steps):
        found.append((next(windows), len(sets)))
        progress.step += 1
    return found


def rows_of(window):
    return [example.row for example in window.examples]


def test_each_step_has_the_rows_that_it_would_have_had_and_none_is_sampled_for_steps_beyond_the_last(run_of):
    plain = [rows_of(window) for window, _ in taken(run_of(), 7)]
    dealt = taken(run_of("--steps_per_generation", "3"), 7)
    assert [rows_of(window) for window, _ in dealt] == plain
    assert [sets for _, sets in dealt] == [1, 1, 1, 2, 2, 2, 3]
    assert [window.position for window, _ in dealt] == [
        *[{"epoch": 0, "offset": 6}] * 3,
        *[{"epoch": 1, "offset": 4}] * 3,
        {"epoch": 1, "offset": 6},
    ]
    assert [window.micros[0].old is None for window, _ in dealt] == [False] * 6 + [True], "the last step is on policy"


def test_out_of_memory_after_a_resume_inside_a_set_keeps_what_its_steps_are_compared_with(run_of):
    """The policy has changed since the set was begun, so old log-probs cannot be computed anew."""

    words = "--max_steps", "2", "--steps_per_generation", "2", "--save_steps", "1", "--learning_rate", "1e-2"
    loop.train_run(run_of(*words), quiet=True)
    shutil.rmtree("out/checkpoint-2")
    run = run_of(*words, "--resume_from_checkpoint", "out/checkpoint-1")
    window = next(loop.steps(run, restore(run)))

    def old():
        return by_completion((micro.batch, micro.old) for micro in window.micros)

    before, run.step.micro_batch_tokens = old(), 12
    cut_again(run.step, window)
    assert len(window.micros) > 1
    torch.testing.assert_close(old(), before, rtol=0, atol=0)


def test_a_resume_inside_a_set_has_its_windows_in_their_order(run_of):
    """1, 2, 1, 2: of which the second, third and fourth are left, two of them the same; then one step alone."""
    words = "--max_steps", "5", "--steps_per_generation", "2", "--num_iterations", "2", "--save_steps", "1"
    loop.train_run(run_of(*words), until=lambda run, row: True, quiet=True)
    run = run_of(*words, "--resume_from_checkpoint", "out/checkpoint-1")
    progress = restore(run)
    first, _, third = progress.windows
    assert first is third and [window.taken for window in progress.windows] == [1, 1, 1]
    found = taken(run, 4, progress)
    assert [rows_of(window) for window, _ in found] == [[2, 3], [0, 1], [2, 3], [4, 5]]
    assert [sets for _, sets in found] == [0, 0, 0, 1]
    assert found[-1][0].position == {"epoch": 0, "offset": 6}, "its two prompts, and none for a step that does not come"


def test_the_order_is_trls(run_of, monkeypatch):
    """Which prompts of which generation each optimizer step of TRL's own trainer learns from."""
    pytest.importorskip("trl")
    from trl.trainer import grpo_trainer

    from logratio.reference._trl_drive import constructed

    options = {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "beta": 0.0}
    options |= {"steps_per_generation": 4, "num_iterations": 2, "shuffle_dataset": False}
    rewards = [lambda completions, **_: [0.0] * len(completions)]
    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", lambda batch: batch)  # it deals completions at random
    theirs, generations = [], []
    with constructed("grpo", tiny_model(num_hidden_layers=1), tiny_tokenizer(), ROWS, options,
                     reward_funcs=rewards, copied=False) as trainer:  # fmt: skip
        trainer.model.train()

        def generate(batch):
            generations.append(1)
            return {"row": torch.tensor([ROWS.index(one) for one in batch])}

        trainer._generate_and_score_completions = generate
        for number, batch in enumerate(trainer.get_train_dataloader()):
            rows = trainer._prepare_inputs(batch)["row"].tolist()
            trainer._step += 1
            if number % 2 == 0:
                theirs.append(([], len(generations)))
            theirs[-1][0].extend(rows[::2])
    assert len(theirs) == 8
    words = ["--steps_per_generation", "2", "--num_iterations", "2", "--max_steps", "8"]
    ours = [(rows_of(window), sets) for window, sets in taken(run_of(*words), 8)]
    assert ours == theirs


def test_beside_gradient_accumulation_it_counts_micro_steps(run_of):
    words = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    for given, steps in ((["--steps_per_generation", "6"], 3), (["--steps_per_generation", "1"], 1), ([], 1)):
        assert run_of(*words, *given).config.rollout.steps_per_generation == steps


def test_every_step_is_compared_with_the_policy_that_sampled(run_of):
    """However far the policy has gone since; also where memory runs out, and the window is cut anew, only then."""
    run = run_of("--steps_per_generation", "2")
    windows, (first, last) = loop.steps(run, Progress()), (None, None)
    first = next(windows)
    learn(run.step, first)
    for parameter in run.trained:
        parameter.data += 0.1
    last = next(windows)
    assert last.taken == 1
    run.step.micro_batch_tokens = 12
    learn(run.step, last)
    assert len(last.micros) > 1
    for window in (first, last):
        for micro in window.micros:
            scored = micro.batch.scored
            torch.testing.assert_close(micro.old[scored], micro.behavior[scored], rtol=0, atol=1e-5)
    old = last.micros[0].old.clone()
    run.step.fill_old(last.micros)
    assert (last.micros[0].old - old).abs().max() > 0.01, "the policy is another one now"


class Beside(InProcess):
    """Samples at once what a server would while the policy goes on learning."""

    asked = ()

    def begin(self, requests, sampling):
        self.asked += ((self.version, len(requests)),)
        said = self.sample(requests, sampling)
        return Begun(lambda stop: said)


def test_a_set_ahead_is_of_the_policy_of_a_step_before_its_first_and_compared_with_that_of_its_first(run_of):
    """Two steps on each set, five of them, one version behind: asked for in the middle of the set before."""
    served = ["--rollout_engine", "vllm", "--vllm_server_base_url", "http://nobody", "--max_staleness", "1"]
    words = ["--steps_per_generation", "2", "--max_steps", "5"]
    run, progress = run_of(*words, *served), Progress()
    rollouts = run.rollouts
    rollouts.engine = engine = Beside(rollouts.policy, rollouts.tokenizer)
    windows, rows, asked, behind = loop.steps(run, progress), [], [], []
    for step in range(5):
        window = next(windows)
        rows.append(rows_of(window))
        asked.append(engine.asked)
        behind.append(float(window.metrics["sampling/staleness_max"].total))
        if step % 2 == 0:
            olds = window.micros[0].old, window.micros[0].behavior
            if step < 4:
                far = (olds[0] - olds[1])[window.micros[0].batch.scored].abs().max()
                assert far > 0.01 if step else far < 1e-5, "the policy that sampled is a step behind"
            run.step.fill_old(window.micros)
            assert olds[0] is None or torch.allclose(window.micros[0].old, olds[0], rtol=0, atol=1e-6)
        for parameter in run.trained:
            parameter.data += 0.1
        progress.step += 1
        rollouts.after(progress.step)
    first, second, last = (0, 4), (1, 4), (3, 2)
    assert asked == [(first,), (first, second), (first, second), (first, second, last), (first, second, last)]
    assert rows == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1]] and behind == [0, 0, 1, 1, 1]


def test_rewards_are_compared_over_all_that_was_sampled(run_of):
    """With --scale_rewards batch the standard deviation is that of the set, as TRL has it."""
    run = run_of("--steps_per_generation", "3", "--scale_rewards", "batch")
    run.rollouts.rewards = {"r": lambda completions, **_: [float(i * i) for i in range(len(completions))]}
    windows = [window for window, _ in taken(run, 3)]
    std = torch.tensor([float(i * i) for i in range(12)]).double().std() + 1e-4
    wanted = [sign * (2 * i + 1) / 2 / float(std) for i in range(0, 12, 2) for sign in (-1, 1)]
    assert [a for w in windows for e in w.examples for a in e.advantages] == pytest.approx(wanted, rel=1e-12)
    assert [a for w in windows for m in w.micros for e in m.batch.examples for a in e.advantages] == wanted


def test_micro_batches_change_nothing(tmp_path, monkeypatch):
    logs = []
    for tokens in (8192, 14):
        words = [
            "train",
            "grpo",
            "--batch_size",
            "3",
            "--num_generations",
            "3",
            "--max_completion_length",
            "5",
            *GRADED,
        ]
        words += ["--max_steps", "5", "--steps_per_generation", "2", "--num_iterations", "2", "--learning_rate", "1e-2"]
        words += ["--reward_kl_coef", "0.1", "--lora_r", "2", "--micro_batch_tokens", str(tokens)]
        assert cli.main([*words, "--output_dir", str(tmp_path / str(tokens))]) == 0
        logs.append([json.loads(line) for line in (tmp_path / str(tokens) / "metrics.jsonl").read_text().splitlines()])
    for one, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "reward", "kl", "sampling/logp_diff_max"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=2e-5), (one["step"], name)
