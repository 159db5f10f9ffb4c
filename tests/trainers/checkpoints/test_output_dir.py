"""The output folder: refused in time where it cannot be written to or holds another run's model."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from logratio.trainers import cli
from logratio.trainers.checkpoints import output_dir
from logratio.trainers.errors import UserError

WORDS = ["--dataset_name", "rows.jsonl", "--batch_size", "2", "--max_steps", "1", "--learning_rate", "1e-3"]


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+1=", "completion": "1", "chosen": str(i + 1), "rejected": str(i + 20)} for i in range(2)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def train(*options, method="sft", capsys=None):
    """The error's text, or "" of a run that went well."""
    status = cli.main(["train", method, *WORDS, *options])
    error = capsys.readouterr().err if capsys else ""
    assert not capsys or (status == 1) == bool(error)
    return error.removeprefix("logratio: ").strip()


def never(*args, **kwargs):
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("rows.jsonl", "--output_dir rows.jsonl is a file; give a folder"),
        ("rows.jsonl/out", "--output_dir rows.jsonl/out cannot be made, because .*rows.jsonl is a file; give another"),
        ("link", "--output_dir link is a link that leads nowhere; give a folder"),
        ("link/out", "--output_dir link/out cannot be made, because .*link is a link that leads nowhere; give another"),
        ("/proc/out", r"--output_dir /proc/out cannot be written to \(.*\); give another folder"),
        ("x" * 300, r"--output_dir x+\.* (has a name too long|cannot be written to)"),
        (" ", "--output_dir is empty; give a folder"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_loaded(folder, message, monkeypatch, capsys):
    monkeypatch.setattr("logratio.trainers.setup.read_model", never)
    Path("link").symlink_to("nowhere")
    before = set(os.listdir())
    assert re.match(message, train("--output_dir", folder, capsys=capsys))
    assert set(os.listdir()) == before


def test_a_disk_without_room_is_refused_before_the_model_is_loaded(monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(output_dir.shutil, "disk_usage", lambda path: usage(0, 0, output_dir.SLACK + 5 * 2**20))
    monkeypatch.setattr("logratio.trainers.setup.load_model", never)
    # 0.67 M parameters in float32 are 2.6 MiB
    steps = ["--max_steps", "3", "--save_steps", "1", "--output_dir", "out"]
    message = "--output_dir out has 0.07 GiB free, but what is to be saved there (10 x the weights) takes 0.09"
    assert train(*steps, capsys=capsys).startswith(message)


def test_another_runs_model_is_in_the_way_unless_it_may_be_replaced(capsys):
    assert train("--output_dir", "out") == ""
    Path("out/checkpoint-7").mkdir()
    Path("out/chat_template.jinja").write_text("{{ messages }}")
    Path("out/notes.txt").write_text("mine")
    Path("out/ref_log_probs.safetensors").write_text("kept")
    before = {p: p.stat().st_mtime_ns for p in Path("out").rglob("*")}
    capsys.readouterr()
    error = train("--output_dir", "out", "--lora_r", "2", capsys=capsys)
    assert error == (
        "--output_dir out holds another run's model (chat_template.jinja); choose another folder, go on with it by "
        "--resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
    )
    assert {p: p.stat().st_mtime_ns for p in Path("out").rglob("*")} == before
    assert train("--output_dir", "out", "--lora_r", "2", "--overwrite_output_dir", capsys=capsys) == ""
    names = {p.name for p in Path("out").iterdir()}
    assert {"adapter_model.safetensors", "notes.txt", "ref_log_probs.safetensors", "metrics.1.jsonl"} <= names
    assert not names & {"model.safetensors", "config.json", "generation_config.json", "checkpoint-7"}


def test_a_failed_runs_log_is_not_in_the_way(capsys):
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text("{}")
    assert train("--output_dir", "out", capsys=capsys) == "" and Path("out/metrics.1.jsonl").read_text() == "{}"


def test_reference_log_probs_stay_of_use(capsys):
    words = ["--lora_r", "2", "--precompute_ref_log_probs", "--output_dir", "out"]
    assert train(*words, method="dpo") == ""
    stamp = Path("out/ref_log_probs.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    cli.main(["train", "dpo", *WORDS, *words, "--overwrite_output_dir"])
    assert "reference log-probs read from out/ref_log_probs.safetensors" in capsys.readouterr().out
    assert Path("out/ref_log_probs.safetensors").stat().st_mtime_ns == stamp
    Path("out/ref_log_probs.safetensors").write_bytes(b"\x00" * 30)
    error = train(*words, "--overwrite_output_dir", method="dpo", capsys=capsys)
    assert error.startswith("out/ref_log_probs.safetensors cannot be read; delete it: ")


@pytest.mark.parametrize("start", ["out", "out/checkpoint-1"])
def test_what_training_starts_from_is_never_removed(start, capsys):
    assert train("--output_dir", "out", "--lora_r", "2", "--max_steps", "2", "--save_steps", "1") == ""
    capsys.readouterr()
    words = ["--output_dir", "out", "--overwrite_output_dir", "--adapter_name_or_path", start]
    assert train(*words, capsys=capsys) == (
        f"--overwrite_output_dir would remove --adapter_name_or_path {start}, which training starts from; choose "
        "another --output_dir"
    )
    assert Path(start, "adapter_model.safetensors").exists()


def test_an_adapter_of_the_embedded_model_comes_with_its_base(monkeypatch):
    """So that PEFT loads it by its folder alone, from anywhere; a checkpoint too; and training goes on from it."""
    options = ["--lora_r", "2", "--output_dir", "out", "--max_steps", "2", "--save_steps", "1", "--seed", "5"]
    assert train(*options) == ""
    folder = Path("out").resolve()
    monkeypatch.chdir("/")
    loaded = {name: AutoPeftModelForCausalLM.from_pretrained(folder / name) for name in ("", "checkpoint-1")}
    ids = torch.tensor([[50, 43, 49, 61]])
    base = AutoModelForCausalLM.from_pretrained(folder / "base_model")
    outputs_of = [m.eval()(input_ids=ids).logits for m in (*loaded.values(), base.eval())]
    assert not any(torch.equal(a, b) for a, b in zip(outputs_of, outputs_of[1:], strict=False))
    monkeypatch.chdir(folder.parent)
    assert train("--adapter_name_or_path", "out", "--output_dir", "next", "--seed", "5") == ""
    shutil.rmtree("out")
    assert AutoPeftModelForCausalLM.from_pretrained("next").peft_config["default"].r == 2


def test_checkpoints_in_the_way_are_gone_on_with_or_replaced(capsys):
    assert train("--output_dir", "out", "--lora_r", "2", "--max_steps", "2", "--save_steps", "1") == ""
    capsys.readouterr()
    assert "go on with it by --resume_from_checkpoint latest" in train("--output_dir", "out", capsys=capsys)
    both = ["--overwrite_output_dir", "--resume_from_checkpoint", "latest"]
    assert train("--output_dir", "out", *both, capsys=capsys) == (
        "--overwrite_output_dir removes what --resume_from_checkpoint goes on from; leave one of them out"
    )


def test_latest_takes_no_other_runs_model_for_its_own(capsys):
    """Where there is no checkpoint the run would begin, and write over a model that is not its own."""
    assert train("--output_dir", "out") == ""
    capsys.readouterr()
    for asked in ("latest", "elsewhere/checkpoint-3"):
        error = train("--output_dir", "out", "--resume_from_checkpoint", asked, capsys=capsys)
        assert error.startswith("--output_dir out holds another run's model")


def test_room_is_counted_in_bytes(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(output_dir.shutil, "disk_usage", lambda path: usage(0, 0, output_dir.SLACK + 100))
    output_dir.check_room("anywhere", 50, 2)
    with pytest.raises(UserError, match=r"\(2 x the weights\)"):
        output_dir.check_room("anywhere", 51, 2)


LOCKED = """
import sys
from logratio.trainers.checkpoints.output_dir import locked
with locked(sys.argv[1], main=True):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_run_writes_to_is_refused_until_that_has_ended(capsys):
    """However it ends: the system gives the lock up with the process."""
    other = subprocess.Popen([sys.executable, "-c", LOCKED, "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"mine\n"
    error = train("--output_dir", "out", capsys=capsys)
    host = os.uname().nodename
    assert error == (
        f"--output_dir out is in use by another run (process {other.pid} on {host}); wait for it, or choose another "
        "folder"
    )
    other.kill()
    other.communicate()
    assert train("--output_dir", "out", capsys=capsys) == "" and not Path("out/.lock").exists()


def test_a_run_that_is_refused_leaves_no_folder():
    with pytest.raises(UserError), output_dir.locked("a/b", main=True):
        assert Path("a/b").is_dir()
        raise UserError("no")
    assert not Path("a").exists()


def test_what_a_stopped_run_left_is_no_model():
    """It is said at which step it stopped, by its log, the last line of which may be cut."""
    folder = Path("out")
    (folder / "base_model").mkdir(parents=True)
    found = [folder / "base_model"]
    assert output_dir.held(folder, found) == "another run's model (base_model)"
    (folder / "metrics.jsonl").write_text('{"step": 6}\n{"step": 7}\n{"ste')
    assert output_dir.held(folder, found) == "a run that stopped at step 7, without a checkpoint"
    (folder / "checkpoint-5").mkdir()
    assert output_dir.held(folder, [*found, folder / "checkpoint-5"]) == (
        "a run that stopped at step 7, with a checkpoint"
    )
    assert output_dir.held(folder, [*found, folder / "model-00001-of-00002.safetensors"]).startswith("another run's")
