"""A Hub that cannot be reached is asked once."""

import contextlib
import json
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from logratio.trainers import cli
from logratio.trainers.policy import reach
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer


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


CODE = "raise SystemExit('code beside a model was run')"


@pytest.mark.parametrize("part", ["config", "tokenizer", "reward"])
def test_code_beside_the_files_is_never_run_nor_asked_for(part, tmp_path, monkeypatch, capsys):
    """transformers would read its answer from the terminal: here from what is piped in, and it says yes."""
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save_pretrained("theirs")
    tiny_model().save_pretrained("theirs")
    file, kind = ("tokenizer_config.json", "AutoTokenizer") if part == "tokenizer" else ("config.json", "AutoConfig")
    entries = json.loads(Path("theirs", file).read_text())
    entries |= {"auto_map": {kind: "code.Own"} if part != "tokenizer" else {kind: ["code.Own", None]}}
    entries |= {"model_type": "own"} if part != "tokenizer" else {"tokenizer_class": "Own"}
    Path("theirs", file).write_text(json.dumps(entries))
    Path("theirs", "code.py").write_text(CODE)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    words = ["grpo", "--reward_funcs", "./theirs"] if part == "reward" else ["sft", "--model_name_or_path", "theirs"]
    assert cli.main(["train", *words, "--output_dir", "out"]) == 1
    said = {
        "config": "no model configuration could be loaded from 'theirs'",
        "tokenizer": "no tokenizer could be loaded from 'theirs'",
        "reward": "no reward model could be loaded from './theirs'",
    }[part]
    assert capsys.readouterr().err == (
        f"logratio: {said}: it needs code of its own; only what transformers itself knows is taken\n"
    )
