"""A run that is pushed at its end, to a stand-in of the Hub's client: there is no network."""

import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import RepoUrl, constants

from logratio.trainers import SFTConfig, SFTTrainer, UserError
from logratio.trainers.config import SaveConfig
from logratio.trainers.trl_names.shown import show

from .._runs import ROWS, notes, train

LORA = ["--lora_r", "2"]


class Hub:
    """What was asked of it, and what it had at the time."""

    def __init__(self):
        self.made, self.sent, self.files, self.down = [], [], [], False

    def create_repo(self, name, **options):
        if self.down:
            raise ConnectionError("Max retries exceeded")
        self.made.append((name, options))
        owner, _, short = name.rpartition("/")
        return RepoUrl(f"https://huggingface.co/{owner or 'ada'}/{short}")

    def upload_folder(self, **options):
        self.sent.append(options)
        self.files = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        return f"https://huggingface.co/{options['repo_id']}/commit/1"


@pytest.fixture
def hub(workspace, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub


def test_the_saved_run_is_pushed_once_at_the_end(hub, capsys):
    train("sft", *LORA, "--push_to_hub", "--hub_model_id", "eve/mine", "--hub_private_repo", "True")
    assert hub.made == [("eve/mine", {"private": True, "exist_ok": True})]
    (sent,) = hub.sent
    assert sent["repo_id"] == "eve/mine" and "checkpoint-*" in sent["ignore_patterns"]
    assert {"adapter_model.safetensors", "tokenizer.json", "metrics.jsonl"} <= set(hub.files)
    said = "pushed to https://huggingface.co/eve/mine/commit/1"
    assert capsys.readouterr().out.splitlines()[-1] == said and notes("out")[-1] == (6, said)


def test_without_a_name_it_is_the_folders_of_who_is_logged_in(hub):
    train("sft", *LORA, "--push_to_hub", output="runs/my-run")
    assert hub.made == [("my-run", {"private": None, "exist_ok": True})] and hub.sent[0]["repo_id"] == "ada/my-run"


def test_a_network_that_fails_costs_no_model(hub, capsys):
    hub.down = True
    train("sft", *LORA, "--push_to_hub", "--hub_model_id", "eve/mine", "--hub_private_repo", "True", status=1)
    told = capsys.readouterr()
    assert told.err == (
        "logratio: out could not be pushed to eve/mine: Max retries exceeded; the model is saved, and `logratio push "
        "out eve/mine --private` tries again\n"
    )
    assert "saved in out" in told.out and Path("out/adapter_model.safetensors").exists()
    assert notes("out", "end") == [(6, told.err.removeprefix("logratio: ").strip())]


@pytest.mark.parametrize(
    "token, offline, said",
    [(None, False, "nobody is logged in; `hf auth login`, or set HF_TOKEN"), ("x", True, "HF_HUB_OFFLINE says")],
)
def test_what_is_bound_to_fail_is_refused_before_anything_is_trained(hub, monkeypatch, capsys, token, offline, said):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    train("sft", *LORA, "--push_to_hub", status=1)
    told = capsys.readouterr()
    assert said in told.err and "step 1" not in told.out and not Path("out").exists()


@pytest.mark.parametrize("more", [{"hub_model_id": "eve/mine"}, {"hub_private_repo": False}])
def test_what_only_a_push_reads_is_refused_without_one(more):
    with pytest.raises(UserError, match="is read only with --push_to_hub"):
        SaveConfig(**more)


def test_trls_classes_push_too(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "old")
    small = {"max_steps": 1, "batch_size": 2, "save_strategy": "no", "gradient_checkpointing": False}
    where = {"push_to_hub": True, "hub_model_id": "eve/mine", "hub_token": "hf_secret", "hub_strategy": "end"}
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS]
    args = SFTConfig("out", **small, **where)
    trainer = SFTTrainer(model="tiny", args=args, train_dataset=rows)
    show(args.judged, "args")
    assert "hub_token: ..." in (shown := capsys.readouterr().out) and "hf_secret" not in shown
    assert os.environ["HF_TOKEN"] == "hf_secret"
    with pytest.raises(UserError, match="out holds no model yet"):
        trainer.push_to_hub()
    trainer.train()
    assert [sent["repo_id"] for sent in hub.sent] == ["eve/mine"] and "model.safetensors" in hub.files
    pushed = trainer.push_to_hub(dataset_name="a/b")  # as TRL's own scripts call it
    assert pushed == "https://huggingface.co/eve/mine/commit/1" and len(hub.sent) == 2
    with pytest.raises(UserError, match="^push_to_hub takes no revision: log in, and give hub_private_repo"):
        trainer.push_to_hub(revision="main")


def test_a_script_that_pushes_itself_names_where_to(hub):
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS]
    args = SFTConfig("out", max_steps=1, batch_size=2, save_strategy="no", hub_model_id="eve/mine")
    trainer = SFTTrainer(model="tiny", args=args, train_dataset=rows)
    trainer.train()
    assert not hub.sent
    trainer.push_to_hub()
    assert [sent["repo_id"] for sent in hub.sent] == ["eve/mine"]
