"""What scripts and subclasses do with TRL's trainers beside `train`: it is there too, or said."""

import json
from pathlib import Path

import pytest
from transformers import Trainer

import logratio.trainers
from logratio.trainers import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, UserError
from logratio.trainers.classes.theirs import OF_NO_EFFECT, TRLS

from ._rows import PLAIN, rows


class Overriding(DPOTrainer):
    def compute_loss(self, *arguments, **options):
        raise AssertionError("called")


class Optimizing(SFTTrainer):
    def create_optimizer(self):
        raise AssertionError("called")


class Helping(SFTTrainer):
    """Of methods of its own, and of ours."""

    _tag_names = ["mine"]  # noqa: RUF012

    def summary(self):
        return f"{self.state.global_step} steps"

    def train(self):
        return super().train().global_step


def test_what_a_subclass_would_change_in_trls_loop_is_refused(here):
    said = "^Overriding has its own 'compute_loss', which nothing here calls: a loss of your own is a class that is "
    with pytest.raises(UserError, match=said):
        Overriding("model", args=DPOConfig("out", **PLAIN), train_dataset=rows())
    with pytest.raises(
        UserError, match="Optimizing has its own 'create_optimizer', .*: a loop of your own calls `Step`"
    ):
        Optimizing("model", SFTConfig("out", **PLAIN), train_dataset=rows("sft"))
    trainer = Helping("model", SFTConfig("out", **PLAIN), train_dataset=rows("sft"))
    assert (trainer.summary(), trainer.train(), trainer.summary()) == ("0 steps", 3, "3 steps")
    own = type("Evaluating", (SFTTrainer,), {"evaluate": lambda self: {}})
    with pytest.raises(UserError, match="^Evaluating has its own 'evaluate', .*: an evaluation's metrics go "):
        own("model", SFTConfig("out", **PLAIN), train_dataset=rows("sft"))


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO"])
def test_every_method_of_trls_is_called_there_or_said(name):
    theirs = getattr(pytest.importorskip("trl"), f"{name}Trainer")
    of_trl = [one for one in theirs.__mro__ if one.__module__.startswith("trl.")]
    names = {key for one in of_trl for key in vars(one) if not key.startswith("__")}
    ours = getattr(logratio.trainers, f"{name}Trainer")
    unsaid = {key for key in names if not (key in TRLS or key in OF_NO_EFFECT or hasattr(ours, key))}
    assert unsaid <= set(dir(Trainer)) and {"_tag_names"} <= names  # which are said in a word for all


def test_what_scripts_do_behind_training(here, capsys):
    trainer = SFTTrainer("model", SFTConfig("out", hub_model_id="me/mine", **PLAIN), train_dataset=rows("sft"))
    metrics = trainer.train().metrics
    assert metrics["train_loss"] == pytest.approx(sum(row["loss"] for row in trainer.state.log_history) / 3)
    assert metrics["train_runtime"] > 0
    trainer.log_metrics("train", {"b": 2, "a": 1.5})
    assert "***** train metrics *****\n  a = 1.5\n  b = 2\n" in capsys.readouterr().out
    trainer.save_metrics("train", {"loss": 1.0})
    trainer.save_metrics("eval", {"eval_loss": 2.0})
    trainer.save_metrics("test", {"test_loss": 3.0}, combined=False)
    saved = {path.name: json.loads(path.read_text()) for path in Path("out").glob("*_results.json")}
    one, two, three = {"loss": 1.0}, {"eval_loss": 2.0}, {"test_loss": 3.0}
    assert saved == {
        "train_results.json": one, "eval_results.json": two, "test_results.json": three, "all_results.json": one | two
    }  # fmt: skip
    trainer.save_state()
    assert json.loads(Path("out/trainer_state.json").read_text())["global_step"] == 3
    assert trainer.hub_model_id == "me/mine" and trainer.is_world_process_zero() and trainer.is_local_process_zero()
    assert len(trainer.train_dataset) == 12 and trainer.eval_dataset is None
    capsys.readouterr()
    trainer.create_model_card(dataset_name="mine", tags=["a"])
    assert capsys.readouterr().out == "no model card is written: `logratio report out` writes one of the run\n"
    with pytest.raises(UserError, match=r"evaluate\(\) is on the trainer's own eval_dataset=; `logratio eval RUN"):
        trainer.evaluate(rows("sft", 2))
    trainer.end()
    with pytest.raises(AttributeError, match="has no 'max_length', as TRL's has: it is args.max_length, an option"):
        trainer.max_length  # noqa: B018
    with pytest.raises(AttributeError, match="SFTTrainer has no 'predict', as TRL's has: a loop of your own calls"):
        trainer.predict(None)
    with pytest.raises(AttributeError, match="has no 'lr_scheduler', as TRL's has: it is run.scheduler"):
        trainer.lr_scheduler  # noqa: B018
    with pytest.raises(AttributeError, match="^SFTTrainer has no 'nothing'$"):
        trainer.nothing  # noqa: B018
    assert not hasattr(trainer, "_nothing")


def test_what_a_property_raises_is_not_taken_for_one_that_is_missing(here, monkeypatch):
    trainer = SFTTrainer("model", SFTConfig("out", **PLAIN), train_dataset=rows("sft"))
    monkeypatch.setattr(SFTTrainer, "_built", lambda self: self.config.nothing)
    with pytest.raises(AttributeError, match="'RunConfig' object has no attribute 'nothing'"):
        trainer.model  # noqa: B018
