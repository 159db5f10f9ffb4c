"""`logratio train grpo --max_staleness`: servers sample what later steps learn from while this one is taken."""

import json
import math
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

from logratio.trainers import cli, setup
from logratio.trainers.checkpoints.folder import checkpoints_in
from logratio.trainers.ground.signals import STATUS
from logratio.trainers.options import parse_train
from logratio.trainers.policy.tiny import tiny_model
from logratio.trainers.rollout.engines import server as server_module
from logratio.trainers.rollout.engines import vllm
from logratio.trainers.rollout.rollouts import Rollouts
from logratio.trainers.step import Step

from .._runs import LATEST, back_to, completions, log, weights
from ..processes._launch import launch
from ._server import SmallServer

STEPS = 5
WORDS = ["--lora_r", "2", "--max_steps", f"{STEPS}", "--batch_size", "2", "--num_generations", "3", "--save_steps", "1"]
WORDS += ["--max_completion_length", "4", "--reward_funcs", "own:odd", "--learning_rate", "1e-2"]
PATIENCE_S = 30.0  # for what comes at once
SAVED = "ahead.json"


@pytest.fixture
def small(tokenizer, monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_PAUSE_S", 0.01)
    server = SmallServer(tiny_model(42), tokenizer)
    yield server
    server.close()


def words(server, staleness, *more, output="out", timeout="60"):
    rows = [{"prompt": f"{i % 5}+{i % 3}="} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    at = ["--rollout_engine", "vllm", "--vllm_server_base_url", server.url, "--vllm_server_timeout", timeout]
    ahead = ["--max_staleness", str(staleness)] if staleness else []
    return ["train", "grpo", "--dataset_name", "rows.jsonl", "--output_dir", output, *WORDS, *at, *ahead, *more]


def train(server, staleness, *more, status=0, **where):
    assert cli.main(words(server, staleness, *more, **where)) == status
    assert not [t for t in threading.enumerate() if t.name == "sampling ahead"]


def assert_same(one, other):
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert log(one)[-1]["hash"] == log(other)[-1]["hash"] and len(log(other)) == STEPS
    assert completions(one) == completions(other)


def says(version):
    """Whether a request is for a completion of this version."""
    return lambda path, body: path == "/v1/completions" and body["model"].endswith(f"-{version}")


def versions(folder):
    """{step: versions that its completions are of}"""
    found = {}
    for row in completions(folder):
        found.setdefault(row["step"], set()).add(row["policy_version"])
    return found


def saved_after(folder="out"):
    return sorted(step for step, _ in checkpoints_in(Path(folder)))


def test_a_server_samples_while_the_policy_trains(small, workspace, monkeypatch):
    """Each waits for the other: no step ends before what comes behind it is asked for, nor is that said before."""
    asked, training, call = threading.Event(), threading.Event(), Step.__call__
    ours, met = says(1), []

    def held(path, body):
        if ours(path, body):
            asked.set()
            met.append(training.wait(PATIENCE_S))

    def computing(self, *args, **kwargs):
        if any(name.endswith("-1") for name in small.adapters) and not training.is_set():
            training.set()
            met.append(asked.wait(PATIENCE_S))
        return call(self, *args, **kwargs)

    small.before = held
    monkeypatch.setattr(Step, "__call__", computing)
    train(small, 1, "--max_steps", "3")
    assert met == [True] * 7  # 2 prompts x 3, and the step


MANY = pytest.mark.slow


@pytest.mark.parametrize(
    ("staleness", "iterations"),
    [(1, 1), pytest.param(2, 1, marks=MANY), pytest.param(1, 2, marks=MANY), pytest.param(3, 2, marks=MANY)],
)
def test_versions_are_those_of_the_schedule_and_are_seen(small, workspace, monkeypatch, staleness, iterations):
    """In the table of completions and in the log; and the evaluations between them are of the policy as it is."""
    found, sample, most = [], Rollouts.sample, [0]

    def watched(self, requests, prompts):
        said = sample(self, requests, prompts)
        found.append(({s.version for samples in said for s in samples}, self.state.global_step))
        return said

    def loaded(path, body):
        if path == "/v1/completions":
            most[0] = max(most[0], len(small.adapters))

    small.before = loaded
    monkeypatch.setattr(Rollouts, "sample", watched)
    train(small, staleness, "--num_iterations", str(iterations), "--eval_steps", "2", "--eval_size", "2")
    firsts = list(range(0, STEPS, iterations))
    assert versions("out") == {first + 1: {max(0, first - staleness)} for first in firsts}
    for row in log("out"):
        first = (row["step"] - 1) // iterations * iterations
        assert row["sampling/staleness_mean"] == row["sampling/staleness_max"] == min(first, staleness)
        assert row["rollout_wait_ms"] >= 0 and row["rollout_ms"] > 0
        assert (row["sampling/logp_diff_mean"] > 1e-3) == (first > 0), "of other weights than those that learn"
    assert found == [({step}, step) for step in (2, 4, STEPS)]
    assert most[0] <= staleness + 2  # one more for a moment, when a new one has come
    assert small.models() == [] and not Path("out/.adapters").exists()


def test_by_default_nothing_is_sampled_ahead(small, workspace, monkeypatch):
    """And a policy that never changes says the same however early it is asked."""
    still = ["--max_steps", "3", "--learning_rate", "0"]
    train(small, 2, *still, output="ahead")
    monkeypatch.setattr(vllm, "Begun", None)
    train(small, 0, *still)
    assert not {"sampling/staleness_mean", "rollout_wait_ms"} & log("out")[0].keys()
    assert versions("out") == {1: {0}, 2: {1}, 3: {2}} and not list(Path("out").rglob(SAVED))
    ahead, out = ([{**row, "policy_version": 0} for row in completions(folder)] for folder in ("ahead", "out"))
    assert ahead == out and len({row["completion"] for row in out}) > 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("staleness", "option", "each", "step"),
    [
        (2, "num_iterations", 1, 2),
        (1, "num_iterations", 1, 1),
        (3, "num_iterations", 2, 1),
        (1, "num_iterations", 2, 3),
        (2, "steps_per_generation", 2, 1),
    ],
)
def test_a_run_goes_on_with_what_was_in_flight(small, workspace, staleness, option, each, step):
    """To the same bits, without asking again, though the policy that said it is not there any more."""
    more = [f"--{option}", str(each)]
    train(small, staleness, *more, output="whole")
    shutil.copytree("whole", "out")
    path, firsts = Path(f"out/checkpoint-{step}", SAVED), range(0, STEPS, each)
    landed = json.loads(path.read_text()) if path.exists() else []
    in_flight = [max(0, f - staleness) for f in firsts if f >= step and f - staleness < step]
    assert [{s["version"] for some in window for s in some} for window in landed] == [{v} for v in in_flight]
    back_to(step)
    small.asked.clear()
    train(small, staleness, *more, *LATEST)
    assert_same("whole", "out")
    later = [f for f in firsts if f - staleness >= step]
    sizes = [min(each, STEPS - f) if option == "steps_per_generation" else 1 for f in later]
    assert sum(path == "/v1/completions" for path, _ in small.asked) == 6 * sum(sizes)
    assert not Path(f"out/checkpoint-{STEPS}", SAVED).exists(), "nothing is sampled for nobody"


@pytest.mark.slow
def test_a_server_that_dies_meanwhile_and_comes_back_costs_time(small, workspace):
    """It is given all adapters again that are still sampled from."""
    train(small, 2, output="whole")
    ours, count = says(2), [0]

    def dies(path, body):
        count[0] += ours(path, body)
        if count[0] == 3:
            count[0] += 1
            small.kill()
            small.start()

    small.before = dies
    train(small, 2)
    assert count[0] > 6
    assert_same("whole", "out")


def test_one_that_stays_away_ends_the_run_at_the_step_that_needed_it(small, workspace, capsys, monkeypatch):
    """Its checkpoint is whole; what had not been said is sampled later, by a policy that is less old."""
    ours, until = says(2), server_module.Server._until

    def dies(path, body):
        if ours(path, body) and small.http is not None:
            small.kill()

    def never(self, began, timeout):
        """The time is over as soon as it is dead, however slow this machine is."""
        return until(self, began, timeout) if small.http is not None else -math.inf

    small.before = dies
    monkeypatch.setattr(server_module.Server, "_until", never)
    train(small, 1, status=1)
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"step 4: the vLLM server {small.url} has not answered for 60 s (" in said
    assert said.endswith("): start it, correct --vllm_server_base_url, or wait longer with --vllm_server_timeout")
    assert saved_after() == [1, 2, 3]
    assert Path("out/checkpoint-2", SAVED).exists() and not Path("out/checkpoint-3", SAVED).exists()
    small.before = lambda path, body: None
    small.start()
    train(small, 1, *LATEST)
    assert versions("out") == {1: {0}, 2: {0}, 3: {1}, 4: {3}, 5: {3}}
    assert [row["step"] for row in log("out")] == [1, 2, 3, 4, 5] and small.models() == []


def test_a_signal_in_the_middle_of_it_ends_the_run_in_good_order(small, workspace):
    """What is in flight then is awaited, and not asked for again."""
    train(small, 2, output="whole")
    ours, sent = says(1), []

    def stops(path, body):
        if ours(path, body) and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    small.before = stops
    train(small, 2, status=STATUS)
    assert saved_after() == [1, 2] and small.models() == []
    small.asked.clear()
    train(small, 2, *LATEST)
    assert_same("whole", "out")
    assert sum(path == "/v1/completions" for path, _ in small.asked) == 6, "of the last window"


@pytest.mark.slow
@pytest.mark.parametrize("dead", [False, True])
def test_several_processes_ask_alike_and_end_together(small, workspace, dead):
    """And what one had in flight, two go on with."""
    slowly = ["--learning_rate", "1e-4"]  # by which the rounding of a sum over processes counts in AdamW's first steps
    train(small, 1, *slowly, output="alone")
    ours = says(1)
    small.before = lambda path, body: (500, "no") if dead and ours(path, body) else None

    def two(output, *more):
        given = words(small, 1, *slowly, *more, output=output, timeout="3" if dead else "60")
        path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
        return launch(2, ["-m", "logratio.trainers.cli", *given], Path.cwd(), PYTHONPATH=path)

    done = two("out")
    if dead:
        assert done.returncode != 0 and "step 3: the vLLM server" in done.stderr
        assert "has not answered for 3 s (500: no)" in done.stderr
        assert done.stderr.count("Traceback") == 1, "the launcher's own"
        return
    assert done.returncode == 0, done.stderr
    shutil.copytree("alone", "again")
    back_to(2, "again")
    done = two("again", *LATEST)
    assert done.returncode == 0, done.stderr
    for folder in ("out", "again"):
        for row, one in zip(completions(folder), completions("alone"), strict=True):
            for rounded in ("sampler_logp", "logp_diff"):
                assert row.pop(rounded) == pytest.approx(one.pop(rounded), abs=1e-4)
            assert row == one
        assert [row["sampling/staleness_max"] for row in log(folder)] == [0, 1, 1, 1, 1]
        a, b = weights("alone"), weights(folder)
        assert all(torch.allclose(a[k], b[k], rtol=0, atol=5e-6) for k in a)


def test_it_is_said_that_nothing_corrects_for_it(small, workspace):
    said = (
        "completions are sampled by earlier policies than the one that learns from them, and weigh as if they were "
        "not: --sampling_correction decoupled corrects for it, token_truncate does so within bounds"
    )
    for more in ([], ["--sampling_correction", "decoupled"]):
        run = setup.build(parse_train(words(small, 1, *more)[1:]))
        assert (said in run.notes) == (not more)
        run.close()


def test_what_does_not_go_with_it(capsys):
    assert cli.main(["train", "grpo", "--max_staleness", "1"]) == 1
    assert capsys.readouterr().err.endswith(
        "--max_staleness 1 lets servers sample while this process trains: add --rollout_engine vllm, or leave it out\n"
    )
    served = ["--rollout_engine", "vllm", "--vllm_server_base_url", "http://a", "--lora_r", "2"]
    for other, why in (
        (["--dynamic_sampling", "2"], "--dynamic_sampling 2: which prompts come next is known when the rewards are; "),
        (["--rollout_func", "own:f"], "--rollout_func own:f: it is called when its completions are learned from; "),
    ):
        assert cli.main(["train", "grpo", "--max_staleness", "1", *other, *served]) == 1
        assert capsys.readouterr().err.endswith(f"--max_staleness 1 does not go with {why}leave one of them out\n")
