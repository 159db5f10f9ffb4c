"""One process that fails, is killed or hangs ends all of a run, and the others say which it was."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore, TCPStore

from logratio.trainers.errors import UserError
from logratio.trainers.processes import watching
from logratio.trainers.processes.watching import Watch

from ._jobs import make_model, words_for
from ._launch import work


def ended(tmp_path, *words):
    """What is said where process 1 of 3 fails; and how many seconds it all took."""
    make_model(tmp_path / "model")
    how, *more = words
    job = {"words": [how, *words_for("dpo", "lora", tmp_path, tmp_path / "out", *more)], "do": "fail"}
    started = time.monotonic()
    done = work(3, [job], tmp_path)
    assert done.returncode != 0 and not (tmp_path / "out" / "adapter_model.safetensors").exists()
    return done.stderr, time.monotonic() - started


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others(tmp_path):
    """Whose launcher is told by the system, and may be sooner than they."""
    said, seconds = ended(tmp_path, "kill")
    assert "process 1 of 3 is gone without a word (killed, or out of memory?)" in said or (
        "rank      : 1 (local_rank: 1)" in said and "exitcode  : -9" in said
    )
    assert seconds < 60


@pytest.mark.slow
def test_a_process_that_hangs_ends_all_once_the_others_have_waited(tmp_path):
    said, seconds = ended(tmp_path, "hang", "--ddp_timeout", "10")
    assert (
        "logratio: process 1 of 3 is still busy, or hanging, where the others have waited for 10 s (--ddp_timeout)"
    ) in said
    assert 10 < seconds < 70


@pytest.mark.slow
def test_a_reward_that_hangs_on_one_process_ends_all_with_its_sentence(tmp_path):
    make_model(tmp_path / "model")
    more = ["--reward_funcs", "_worker:hanging", "--reward_timeout", "2"]
    job = {"words": words_for("grpo", "lora", tmp_path, tmp_path / "out", *more), "do": "command"}
    done = work(2, [job], tmp_path)
    assert "logratio: step 2: the reward 'hanging' has not answered within 2 s (--reward_timeout)" in done.stderr
    assert done.returncode != 0 and "exitcode  : 1" in done.stderr and "--ddp_timeout" not in done.stderr
    assert "of 2 ends, because" not in done.stderr, "all know of it at the same place"
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_run_that_nobody_has_ended_is_watched_no_longer_where_its_process_ends(monkeypatch):
    """A thread that is inside the store when the interpreter goes aborts it."""
    launcher = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(launcher.port))
    monkeypatch.setattr(watching, "WATCHES", [])
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(watching.atexit, "register", at_exit.append)
    watching.watch_over(SimpleNamespace(num_processes=2, process_index=0), 7)
    (watch,) = watching.WATCHES
    assert watch.thread.is_alive()
    for end in at_exit:
        end()
    assert not watch.thread.is_alive()


def test_a_watch_that_is_stopped_is_waited_for_though_the_store_is_slow(monkeypatch):
    """As of a machine with more to do than it has cores."""
    monkeypatch.setattr(watching, "INTERVAL", 0.05)
    asked = threading.Event()

    def slow(names):
        asked.set()
        time.sleep(0.5)

    watch = Watch(SimpleNamespace(set=lambda *_: None, check=slow), 0, 2, timeout=7).start()
    asked.wait()
    watch.stop()
    assert not watch.thread.is_alive()


BROKEN = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")


@pytest.fixture
def three(monkeypatch):
    """Watches of three processes over one store; none of them ends the interpreter."""
    monkeypatch.setattr(watching, "GRACE", 2.0)
    monkeypatch.setattr(watching, "INTERVAL", 0.05)
    left = []
    monkeypatch.setattr(watching.os, "_exit", left.append)
    store = HashStore()
    watches = [Watch(store, rank, 3, timeout=7) for rank in range(3)]
    yield watches, left
    for watch in watches:
        watch.stop()


def in_turn(*calls):
    """What each call returns, all at the same time."""
    out = [None] * len(calls)

    def run(i):
        out[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_the_others_say_who_failed_and_leave(three, capsys):
    watches, left = three
    for watch in watches:
        watch.start()
    error = UserError("row 7 has no prompt")
    assert watches[2].failed(error) is error, "which says it itself"
    said = capsys.readouterr().err
    for rank in (0, 1):
        assert f"logratio: process {rank} of 3 ends, because process 2 failed: row 7 has no prompt\n" in said
    for rank in (0, 1):
        watches[rank].thread.join(5)
    assert left == [1, 1], "though their main thread never came back"


def test_a_main_thread_that_comes_back_does_not_say_it_again(three, capsys):
    watches, left = three
    watches[0].start()
    watches[2].failed(ValueError("first\nsecond"))
    assert isinstance(watches[0].failed(BROKEN), SystemExit)
    assert capsys.readouterr().err == "logratio: process 0 of 3 ends, because process 2 failed: ValueError: first\n"
    raised = watches[1].failed(BROKEN)  # whose thread has not looked yet
    assert isinstance(raised, UserError) and "process 1 of 3 ends, because process 2 failed" in str(raised)


def test_all_fail_alike_without_waiting_for_each_other(three, monkeypatch):
    monkeypatch.setattr(watching, "GRACE", 60.0)
    watches, _ = three
    for watch in watches:
        watch.start()
    errors = [UserError("--batch_size 3 is wrong") for _ in watches]
    started = time.monotonic()
    assert in_turn(*(lambda w=w, e=e: w.failed(e) for w, e in zip(watches, errors, strict=True))) == errors
    assert time.monotonic() - started < 30


def test_a_process_that_no_longer_beats_is_gone_and_one_that_does_hangs(three):
    watches, _ = three
    watches[0].start(), watches[1].start()  # number 2 is gone
    raised = in_turn(lambda: watches[0].failed(BROKEN), lambda: watches[1].failed(BROKEN))
    assert {str(error) for error in raised} == {"process 2 of 3 is gone without a word (killed, or out of memory?)"}


def test_a_process_that_beats_and_does_not_come_is_named(three):
    watches, _ = three
    for watch in watches:
        watch.start()
    time.sleep(0.2)
    raised = watches[0].failed(RuntimeError("gloo: Timed out waiting 7000ms for recv operation to complete"))
    assert str(raised) == (
        "processes 1, 2 of 3 are still busy, or hanging, where the others have waited for 7 s (--ddp_timeout)"
    )


def test_where_all_come_and_the_connection_is_broken_the_error_stands(three):
    watches, _ = three
    for watch in watches:
        watch.start()
    raised = in_turn(*(lambda w=w: w.failed(BROKEN) for w in watches))
    assert raised == [BROKEN] * 3


def test_an_error_of_its_own_is_not_taken_for_anothers():
    for error in (
        RuntimeError("shapes do not match"),
        UserError("the gloo of it"),
        ValueError("NCCL"),
        OSError("gloo"),
    ):
        assert not watching.comes_from_others(error)
    assert watching.comes_from_others(BROKEN)
