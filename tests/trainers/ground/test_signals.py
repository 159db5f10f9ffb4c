"""A real signal of each kind, a second one, and a disk that is really full; in the middle of a step."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from logratio.trainers import cli, loop
from logratio.trainers.checkpoints import model
from logratio.trainers.checkpoints.folder import checkpoints_in, damage
from logratio.trainers.checkpoints.output_dir import BASE_MODEL
from logratio.trainers.errors import UserError
from logratio.trainers.ground import signals
from logratio.trainers.step import Step

WORDS = ["--dataset_name", "rows.jsonl", "--batch_size", "2", "--max_steps", "4", "--learning_rate", "1e-3"]


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps({"text": f"{i} and {i + 1}"}) + "\n" for i in range(5)))


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): calls it in the middle of the n-th step from now on."""

    def arrange(number, action, whole=Step.__call__):
        count = iter(range(1, 100))

        def inside(self, *arguments, **options):
            if next(count) == number:
                action()
            return whole(self, *arguments, **options)

        monkeypatch.setattr(Step, "__call__", inside)

    return arrange


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", signals.NAMES)
def test_a_signal_ends_the_run_behind_its_step_and_it_goes_on(name, at_step, capfd):
    assert cli.main(["train", "sft", *WORDS, "--output_dir", "whole"]) == 0
    capfd.readouterr()
    kept = signal.getsignal(getattr(signal, name))
    at_step(2, lambda: send(name))
    assert cli.main(["train", "sft", *WORDS, "--output_dir", "out"]) == signals.STATUS == 75
    assert signal.getsignal(getattr(signal, name)) is kept
    error = capfd.readouterr().err
    assert f"logratio: {name}: the run ends after this step, with a checkpoint" in error
    assert ("; a second Ctrl-C ends it now, without one" in error) == (name == "SIGINT")
    assert error.endswith(
        "logratio: stopped after step 2, saved in out/checkpoint-2; the same command with --resume_from_checkpoint "
        "latest goes on\n"
    )
    assert [step for step, _ in checkpoints_in(Path("out"))] == [2] and not Path("out/model.safetensors").exists()
    assert cli.main(["train", "sft", *WORDS, "--output_dir", "out"]) == 1
    assert capfd.readouterr().err == (
        "logratio: --output_dir out holds a run that stopped at step 2, with a checkpoint; choose another folder, go "
        "on with it by --resume_from_checkpoint latest, or replace it with --overwrite_output_dir\n"
    )
    assert cli.main(["train", "sft", *WORDS, "--output_dir", "out", "--resume_from_checkpoint", "latest"]) == 0
    a, b = load_file("whole/model.safetensors"), load_file("out/model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_second_interrupt_leaves_at_once(at_step, capfd):
    at_step(2, lambda: (send("SIGINT"), send("SIGINT")))
    assert cli.main(["train", "sft", *WORDS, "--output_dir", "out"]) == 130
    assert capfd.readouterr().err.endswith("logratio: interrupted\n")
    assert checkpoints_in(Path("out")) == [] and len(Path("out/metrics.jsonl").read_text().splitlines()) == 1


def test_before_the_first_step_an_interrupt_leaves_at_once(monkeypatch, capfd):
    """There is nothing to save, and reading the data may take long."""
    build = loop.build
    monkeypatch.setattr(loop, "build", lambda config: (send("SIGINT"), build(config))[1])
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a worker of the tests may not have
    try:
        status = cli.main(["train", "sft", *WORDS, "--output_dir", "out"])
    finally:
        signal.signal(signal.SIGINT, kept)
    assert status == 130
    assert capfd.readouterr().err == "logratio: interrupted\n" and not Path("out").exists()


def test_a_second_signal_of_another_kind_changes_nothing(at_step):
    at_step(2, lambda: (send("SIGINT"), send("SIGTERM"), send("SIGUSR1")))
    assert cli.main(["train", "sft", *WORDS, "--output_dir", "out"]) == 75


def test_a_closed_terminal_is_nothing_to_a_run_under_nohup(at_step):
    at_step(2, lambda: send("SIGHUP"))
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["train", "sft", *WORDS, "--output_dir", "out"]) == 0
    finally:
        signal.signal(signal.SIGHUP, kept)
    assert Path("out/model.safetensors").exists()


def test_a_signal_in_the_last_step_is_too_late(at_step):
    at_step(4, lambda: send("SIGTERM"))
    assert cli.main(["train", "sft", *WORDS, "--output_dir", "out"]) == 0
    assert Path("out/model.safetensors").exists() and checkpoints_in(Path("out")) == []


def test_a_limit_of_the_disk_costs_a_checkpoint_and_no_run(at_step, capfd):
    """The system's own refusal, by the largest size of a file (ulimit -f): weights of 2.7 MB into 1 MB."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))

    count = iter(range(1, 100))
    whole = Step.__call__

    def inside(self, *arguments, **options):
        limit({2: 2**20}.get(next(count), unlimited[0]))
        return whole(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", inside)
        try:
            status = cli.main(["train", "sft", *WORDS, "--save_steps", "1", "--output_dir", "out"])
        finally:
            limit(unlimited[0])
    assert status == 0
    shown = capfd.readouterr().out
    assert (
        "step 2: out/checkpoint-2 could not be saved: " in shown
        and "the run goes on, checkpoint-1 is the last" in shown
    )
    assert [step for step, _ in checkpoints_in(Path("out"))] == [4, 3, 1]
    assert all(damage(folder) is None for _, folder in checkpoints_in(Path("out")))
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == 4


def test_a_checkpoint_that_is_there_is_named_whatever_failed_behind_it(monkeypatch, capfd):
    """The embedded model, written beside an adapter's first checkpoint, meets the full disk."""
    whole = model.write_whole

    def but_base(folder, fill):
        if folder.name == BASE_MODEL:
            raise UserError(f"{folder} could not be saved: No space left on device")
        whole(folder, fill)

    monkeypatch.setattr(model, "write_whole", but_base)
    assert cli.main(["train", "sft", *WORDS, "--lora_r", "2", "--save_steps", "1", "--output_dir", "out"]) == 1
    said = (
        "step 1: out/base_model could not be saved: No space left on device; the run goes on, checkpoint-1 is the last"
    )
    assert said in capfd.readouterr().out and damage(Path("out/checkpoint-1")) is None
