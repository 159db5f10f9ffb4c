"""A process has one run at a time, whatever its threads ask for."""

import threading

import pytest

from logratio.trainers.errors import UserError
from logratio.trainers.ground.alone import alone
from logratio.trainers.loop import train_run
from logratio.trainers.options import parse_train
from logratio.trainers.setup import build


def in_another_thread(work):
    """What it raises."""
    raised = []

    def run():
        try:
            work()
        except UserError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised


def test_a_run_in_another_thread_is_refused_while_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_train(["sft", "--max_steps", "1", "--output_dir", "out"])
    with alone():
        run = build(config)  # of the same thread
        for work in (lambda: build(config), lambda: train_run(run)):
            (said,) = in_another_thread(work)
            assert said.startswith("another thread of this process is loading or training a run, and both would change")
    assert in_another_thread(lambda: train_run(build(config), quiet=True)) == []


def test_what_ends_a_run_frees_the_process():
    with pytest.raises(ZeroDivisionError), alone():
        raise ZeroDivisionError
    with alone():
        assert in_another_thread(lambda: alone().__enter__())
