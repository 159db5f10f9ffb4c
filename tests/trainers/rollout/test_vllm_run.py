"""`logratio train grpo --rollout_engine vllm`: what it learns, what it leaves behind, what a dead server costs it."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from logratio.trainers import cli
from logratio.trainers.policy.tiny import tiny_model
from logratio.trainers.rollout.engines import server as server_module
from logratio.trainers.rollout.rollouts import Rollouts

from .._runs import completions
from ..processes._launch import launch, log_of
from ._server import RealServer, SmallServer, logps_of

WORDS = ["--lora_r", "2", "--max_steps", "3", "--batch_size", "2", "--num_generations", "3", "--learning_rate", "1e-2"]
WORDS += ["--max_completion_length", "5", "--save_steps", "1", "--reward_funcs", "own:odd"]


@pytest.fixture
def small(tokenizer):
    server = SmallServer(tiny_model(42), tokenizer)
    yield server
    server.close()


def words(output, *more):
    rows = [{"prompt": f"{i % 5}+{i % 3}="} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["train", "grpo", "--dataset_name", "rows.jsonl", "--output_dir", output, *WORDS, *more]


def at(*urls, timeout="60"):
    return ["--rollout_engine", "vllm", "--vllm_server_base_url", ",".join(urls), "--vllm_server_timeout", timeout]


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def said_in(folder):
    return [(row["step"], row["row"], row["completion"]) for row in completions(folder)]


def assert_same(one, other, tolerance=0.0):
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=0, atol=tolerance) for k in a)


def seen(monkeypatch):
    """[(largest difference from the policy's log-probs, version)] of every call of the engine."""
    found, sample = [], Rollouts.sample

    def watched(self, requests, prompts):
        said = sample(self, requests, prompts)
        differences = [
            abs(mine - theirs)
            for request, samples in zip(requests, said, strict=True)
            for s in samples
            for mine, theirs in zip(s.logps, logps_of(self.policy, request.prompt_ids, s.ids), strict=True)
        ]
        found.append((max(differences), {s.version for samples in said for s in samples}))
        return said

    monkeypatch.setattr(Rollouts, "sample", watched)
    return found


def test_it_learns_what_it_learns_in_the_process(small, workspace, monkeypatch):
    """From the same completions, sampled with the adapter of every step; nothing is left at the server or beside it."""
    assert cli.main(words("here")) == 0
    start = {name: value for name, value in weights("here/checkpoint-1").items() if "lora_B" in name}
    assert all(value.any() for value in start.values())
    found = seen(monkeypatch)
    assert cli.main(words("there", *at(small.url))) == 0
    assert [versions for _, versions in found] == [{0}, {1}, {2}]
    assert max(worst for worst, _ in found) < 1e-5
    assert_same("here", "there", 1e-6)
    assert small.models() == [] and not Path("there/.adapters").exists()


@pytest.mark.slow
def test_a_server_that_stays_away_ends_the_run_which_goes_on_later(small, workspace, capsys, monkeypatch):
    monkeypatch.setattr(server_module, "FIRST_PAUSE_S", 0.01)
    assert cli.main(words("whole", *at(small.url))) == 0
    count = [0]

    def dies(path, body):
        count[0] += path == "/v1/completions"
        if count[0] == 9:
            count[0] += 1
            small.kill()

    small.before = dies
    assert cli.main(words("out", *at(small.url, timeout="0.5"))) == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(
            f"step 2: the vLLM server {small.url} has not answered for 0.5 s (Connection refused): start it, correct "
            "--vllm_server_base_url, or wait longer with --vllm_server_timeout; step 1 is kept: the same command with "
            "--resume_from_checkpoint latest goes on from it"
        )
    )
    small.start()
    assert cli.main(words("out", *at(small.url), "--resume_from_checkpoint", "latest")) == 0
    assert_same("whole", "out")
    assert [row["step"] for row in log_of(Path("out"))] == [1, 2, 3]
    assert small.models() == []


def test_a_whole_model_is_refused_before_anything_is_loaded(workspace, capsys):
    given = [w for w in words("out", *at("http://127.0.0.1:9")) if w not in ("--lora_r",)]
    given.remove("2")  # of lora_r
    assert cli.main(given) == 1
    assert capsys.readouterr().err.endswith(
        "--rollout_engine vllm gives the servers adapters, and here the whole model is trained: add --lora_r 16, or "
        "leave the engine out\n"
    )
    assert not Path("out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dead", [False, True])
def test_two_processes_have_their_share_and_end_together(small, workspace, dead):
    """The main one tells the server, both ask it."""
    slowly = ["--learning_rate", "1e-4"]  # by which the rounding of a sum over processes counts in AdamW's first steps
    assert cli.main(words("alone", *at(small.url), *slowly)) == 0
    small.before = lambda path, body: (500, "no") if dead and path == "/v1/completions" else None
    given = words("out", *at(small.url, timeout="3" if dead else "60"), *slowly)
    done = launch(2, ["-m", "logratio.trainers.cli", *given], Path.cwd(), PYTHONPATH=str(Path.cwd()))
    if not dead:
        assert done.returncode == 0, done.stderr
        assert said_in("alone") == said_in("out")
        assert_same("alone", "out", 2e-6)
        assert small.models() == []
    else:
        assert done.returncode != 0 and "has not answered for 3 s (500: no)" in done.stderr
        assert done.stderr.count("Traceback") == 1, "the launcher's own"


@pytest.mark.vllm
@pytest.mark.timeout(3600)
def test_ten_steps_with_a_real_server_that_is_killed_once(workspace, monkeypatch, tmp_path):
    """An adapter is pushed every step; log-probs are the trainer's; what the server's death costs is time."""
    server = RealServer(os.environ["LOGRATIO_VLLM"], os.environ["LOGRATIO_VLLM_MODEL"], tmp_path / "vllm.log")
    try:
        found = seen(monkeypatch)
        sample = Rollouts.sample

        def interrupted(self, requests, prompts):
            if len(found) == 5:
                threading.Timer(0.5, lambda: (server.kill(), server.start())).start()
            return sample(self, requests, prompts)

        monkeypatch.setattr(Rollouts, "sample", interrupted)
        given = words("out", *at(server.url, timeout="900"), "--model_name_or_path", str(server.folder))
        for name, value in (("--max_steps", "10"), ("--max_completion_length", "48"), ("--learning_rate", "1e-3")):
            given[given.index(name) + 1] = value
        first = server.process.pid
        assert cli.main(given) == 0
        assert server.process.pid != first
        assert [versions for _, versions in found] == [{step} for step in range(10)]
        print("largest difference of log-probabilities, step by step:", *(f"{worst:.1e}" for worst, _ in found))
        assert max(worst for worst, _ in found) < 1e-4
        assert server.models() == []
    finally:
        server.kill()
