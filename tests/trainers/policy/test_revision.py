"""Models and data of the Hub at a revision: which one is loaded, told, saved beside adapters, and gone on with.

The Hub is what it has left in its cache: two commits of one model, of which `main` and a branch name one each.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import AutoPeftModelForCausalLM

from logratio.losses import Kind
from logratio.trainers import SFTConfig, SFTTrainer, cli
from logratio.trainers.after.trained import load_trained
from logratio.trainers.config import ModelConfig
from logratio.trainers.data.rows import load_rows
from logratio.trainers.errors import UserError
from logratio.trainers.policy.load import load_model
from logratio.trainers.policy.tiny import tiny_model, tiny_tokenizer

NAME = "someone/small"
COMMITS = {"main": "a" * 40, "older": "b" * 40}
SEEDS = {"main": 1, "older": 2}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache's folder of the model."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hub" / "models--someone--small"
    for branch, commit in COMMITS.items():
        tiny_model(SEEDS[branch]).save_pretrained(folder / "snapshots" / commit)
        tiny_tokenizer().save_pretrained(folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / branch).write_text(commit)
    return folder


def train(*words: str, expect: int = 0) -> None:
    common = ["--model_name_or_path", NAME, "--batch_size", "2", "--max_steps", "2", "--output_dir", "out"]
    assert cli.main(["train", "sft", *common, *words]) == expect


@pytest.mark.parametrize(
    ("revision", "branch"), [(None, "main"), ("main", "main"), ("older", "older"), (COMMITS["older"], "older")]
)
def test_the_weights_are_the_revision_s(hub, revision, branch):
    model = load_model(ModelConfig(model_name_or_path=NAME, model_revision=revision), torch.device("cpu"))
    wanted = tiny_model(SEEDS[branch]).state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in model.state_dict().items())


def test_an_adapter_is_saved_with_the_commit_of_its_base(hub, capsys):
    """So that it stands on the weights that it was trained on, whatever main has become: here, and in PEFT."""
    train("--model_revision", "older", "--lora_r", "2")
    assert f"{NAME} is the Hub's commit {COMMITS['older']}" in " ".join(capsys.readouterr().out.split())
    assert json.loads(Path("out/adapter_config.json").read_text())["revision"] == COMMITS["older"]
    assert json.loads(Path("out/run_config.json").read_text())["model"]["model_revision"] == COMMITS["older"]
    (hub / "refs" / "older").unlink()
    wanted = tiny_model(SEEDS["older"]).model.embed_tokens.weight
    ours, _ = load_trained("out", "float32", torch.device("cpu"))
    assert torch.equal(ours.get_base_model().model.embed_tokens.weight, wanted)
    theirs = AutoPeftModelForCausalLM.from_pretrained("out")
    assert torch.equal(theirs.get_base_model().model.embed_tokens.weight, wanted)


def test_a_run_whose_branch_has_moved_goes_on_with_the_commit_that_it_began_with(hub, capsys):
    adapters = ("--lora_r", "2", "--save_steps", "1")
    train(*adapters)
    whole = Path("out/adapter_model.safetensors").read_bytes()
    shutil.rmtree("out/checkpoint-2")
    (hub / "refs" / "main").write_text(COMMITS["older"])
    again = (*adapters, "--resume_from_checkpoint", "latest")
    train(*again, "--model_revision", "older", expect=1)
    said = f"is the commit {COMMITS['older']}, and the run began with {COMMITS['main']}: leave it out"
    assert capsys.readouterr().err == f"logratio: --model_revision older {said}\n"
    train(*again)
    assert Path("out/adapter_model.safetensors").read_bytes() == whole


def test_an_adapter_is_gone_on_with_on_the_commit_that_it_was_trained_on(hub, capsys):
    train("--model_revision", "older", "--lora_r", "2")
    Path("out").rename("first")
    train("--adapter_name_or_path", "first")
    assert json.loads(Path("out/adapter_config.json").read_text())["revision"] == COMMITS["older"]


def test_a_name_beside_a_tokenizer_of_the_program_s_own_is_pinned_too(hub):
    rows = [{"prompt": f"{n} + 1", "completion": f" = {n + 1}"} for n in range(4)]
    more = {"max_steps": 1, "save_strategy": "no", "learning_rate": 0.0, "report_to": "none"}
    args = SFTConfig("out", model_init_kwargs={"revision": "older"}, **more)
    trainer = SFTTrainer(NAME, args, train_dataset=rows, processing_class=tiny_tokenizer())
    trainer.train()
    assert torch.equal(trainer.model.model.embed_tokens.weight, tiny_model(SEEDS["older"]).model.embed_tokens.weight)
    assert json.loads(Path("out/run_config.json").read_text())["model"]["model_revision"] == COMMITS["older"]


@pytest.mark.parametrize("where", ["tiny", "folder"])
def test_what_is_not_on_the_hub_has_no_revision(where, hub, capsys):
    shutil.copytree(hub / "snapshots" / COMMITS["main"], "folder")
    words = ["--model_name_or_path", where, "--model_revision", "older", "--output_dir", "other"]
    assert cli.main(["train", "sft", *words]) == 1
    said = f"logratio: --model_revision older is of a model on the Hub, which {where} is not; leave it out\n"
    assert capsys.readouterr().err == said and not Path("other").exists()


def test_a_revision_that_is_not_there_is_named(hub, capsys):
    train("--model_revision", "newer", expect=1)
    said = capsys.readouterr().err
    assert said.startswith(f"logratio: no model configuration could be loaded from {NAME!r}, which is no folder here")
    assert " at revision newer: " in said and said.count("\n") == 1


def test_data_are_the_revision_s(monkeypatch, tmp_path):
    asked = []
    rows = [{"prompt": "1 + 1 =", "completion": " 2"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *names, **more: asked.append((names, more)) or rows)
    load_rows("someone/data", Kind.SEQUENCE, revision="older")
    assert asked == [(("someone/data", None), {"split": "train", "streaming": False, "revision": "older"})]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    for name in ("arithmetic", str(tmp_path), str(tmp_path / "rows.jsonl")):
        said = f"--dataset_revision older is of a data set on the Hub, which {name} is not; leave it out"
        with pytest.raises(UserError) as raised:
            load_rows(name, Kind.SEQUENCE, revision="older")
        assert str(raised.value) == said


def test_a_run_s_data_have_its_revision_in_training_and_in_eval(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(4)]

    def answer(name, config, **more):
        asked.append(more["revision"])
        return rows

    monkeypatch.setattr("datasets.load_dataset", answer)
    words = ["--dataset_name", "someone/data", "--dataset_revision", "older", "--dataset_test_split", "test"]
    assert cli.main(["train", "sft", *words, "--max_steps", "1", "--output_dir", "out"]) == 0
    assert cli.main(["eval", "out"]) == 0
    listed = '{"path": "someone/data", "revision": "newer"}'
    assert cli.main(["train", "sft", "--datasets", listed, "--max_steps", "1", "--output_dir", "listed"]) == 0
    assert asked == ["older", "older", "older", "newer"]
