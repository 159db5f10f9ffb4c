"""A Hub that cannot be reached is asked once."""

import contextlib
import socket

import pytest
from huggingface_hub import constants

from logratio.trainers import cli
from logratio.trainers.policy import reach


def test_a_misspelt_folder_ends_at_once_where_there_is_no_network(tmp_path, monkeypatch, capsys):
    """With one sentence, and none of the client about what it tries again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    calls = []

    def nowhere(*words, **more):
        calls.append(words[0])
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    assert cli.main(["train", "sft", "--model_name_or_path", "runs/nothing", "--output_dir", "out"]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(
        "logratio: no model configuration could be loaded from 'runs/nothing', which is no folder here (looked in "
        f"{tmp_path}): "
    )
    assert told.err.count("\n") == 1 and "Retry" not in told.out and len(calls) == 1
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("answer", [True, False])
def test_the_client_is_offline_only_inside_and_only_where_nothing_answers(answer, monkeypatch):
    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reach, "answers", lambda: asked.append(1) or answer)
    with contextlib.suppress(OSError), reach.asking_once("runs/nothing"):
        assert constants.HF_HUB_OFFLINE is not answer
        raise OSError
    assert constants.HF_HUB_OFFLINE is False and len(asked) == 1


def test_neither_a_folder_nor_who_is_offline_asks(tmp_path, monkeypatch):
    monkeypatch.setattr(reach, "answers", lambda: pytest.fail("asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with reach.asking_once(str(tmp_path)):
        assert constants.HF_HUB_OFFLINE is False
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with reach.asking_once("runs/nothing"):
        assert constants.HF_HUB_OFFLINE is True
    assert constants.HF_HUB_OFFLINE is True
