"""Callbacks of TRL's classes: what they are told, what they may end, and what of a run that went on they know."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from logratio.trainers import SFTConfig, SFTTrainer, UserError
from logratio.trainers.classes.events import Events

from ._rows import PLAIN, assert_same, rows, trained


class Told(TrainerCallback):
    def __init__(self, until=None):
        self.events, self.until = [], until

    def on_train_begin(self, args, state, control, model, processing_class, optimizer, lr_scheduler, **_):
        self.events.append(("begin", args.learning_rate, state.max_steps, type(model).__name__))

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.until
        return control

    def on_epoch_end(self, args, state, control, **_):
        self.events.append(("epoch", state.global_step))

    def on_log(self, args, state, control, logs, **_):
        self.events.append(("log", state.global_step, "loss" in logs))

    def on_evaluate(self, args, state, control, metrics, **_):
        self.events.append(("evaluate", "eval_loss" in metrics))

    def on_save(self, args, state, control, **_):
        self.events.append(("save", Path(args.output_dir, f"checkpoint-{state.global_step}").exists()))

    def on_train_end(self, *_, **__):
        self.events.append(("end",))


class Inside(TrainerCallback):
    def on_substep_end(self, *_, **__):
        raise AssertionError


def test_callbacks_are_told_and_may_end_it(here, capsys):
    told = Told(until=4)
    args = SFTConfig("out", **PLAIN | {"max_steps": 9, "save_strategy": "steps", "save_steps": 2, "eval_steps": 2})
    data = {"train_dataset": rows("sft"), "eval_dataset": rows("sft", 3)}
    trainer = SFTTrainer("model", args, callbacks=[told, Inside], **data)
    trainer.train()
    assert told.events == [
        ("begin", 1e-3, 9, "LlamaForCausalLM"),
        ("log", 1, True),
        ("evaluate", True),
        ("log", 2, True),
        ("save", True),
        ("epoch", 3),
        ("log", 3, True),
        ("evaluate", True),
        ("log", 4, True),
        ("save", True),
        ("end",),
    ]
    assert "the callback Inside has on_substep_end, which never comes" in capsys.readouterr().out
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.log_history[-1]["eval_loss"], rel=1e-5)
    trainer.save_model("elsewhere")
    assert_same(trained("out"), trained("elsewhere"))


def test_transformers_own_early_stopping(here):
    early = EarlyStoppingCallback(early_stopping_patience=1)
    args = SFTConfig(
        "out", **PLAIN | {"max_steps": 30, "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1}
    )
    trainer = SFTTrainer("model", args, train_dataset=rows("sft"), eval_dataset=rows("sft", 3), callbacks=[early])
    assert trainer.train().global_step == 2


class Wishing(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_save = state.global_step < 3

    def on_evaluate(self, args, state, control, metrics, **_):
        self.best = state.best_metric, state.best_global_step, state.best_model_checkpoint


def test_a_callback_may_come_later_and_go_and_what_it_wishes_for_in_vain_is_told_once(here, capsys):
    wishing, told = Wishing(), Told()
    options = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 9, "save_strategy": "no"}
    args = SFTConfig("out", **PLAIN | options, load_best_model_at_end=True)
    trainer = SFTTrainer(
        "model", args, train_dataset=rows("sft"), eval_dataset=rows("sft", 3), callbacks=[told, Inside]
    )
    trainer.remove_callback(Inside)
    assert trainer.pop_callback(told) is told and trainer.pop_callback(told) is None
    trainer.add_callback(wishing)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    assert trainer.train().global_step == 3 and told.events == []
    said = capsys.readouterr()
    assert "on_substep_end" not in said.out
    assert said.err.count("the callback Wishing sets should_save, which nothing reads: save_strategy and save_s") == 1
    first = trainer.state.log_history[0]["eval_loss"]
    assert wishing.best == (first, 1, "out/checkpoint-1") and Path("out/checkpoint-1").is_dir()
    assert trainer.state.num_train_epochs == 3 and trainer.evaluate(metric_key_prefix="test")["test_loss"] == first
    assert not trainer.is_fsdp_enabled and trainer.tokenizer is trainer.processing_class
    with pytest.raises(UserError, match="EarlyStoppingCallback: the model has been asked for already"):
        trainer.add_callback(EarlyStoppingCallback())


def test_it_goes_on_from_its_checkpoint(here):
    args = PLAIN | {"save_strategy": "steps", "save_steps": 1}
    SFTTrainer("model", SFTConfig("whole", **args), train_dataset=rows("sft")).train()
    short = SFTTrainer("model", SFTConfig("out", **args), train_dataset=rows("sft"), callbacks=[Told(until=2)])
    assert short.train().global_step == 2
    with open("out/metrics.jsonl", "a") as torn:
        torn.write('{"step": 3, "los')  # by a kill
    again = SFTTrainer("model", SFTConfig("out", **args), train_dataset=rows("sft"), callbacks=[told := Told()])
    result = again.train(resume_from_checkpoint=True)
    assert_same(trained("whole"), trained("out"))
    log = again.state.log_history
    assert [row["step"] for row in log] == [1, 2, 3] and len({frozenset(row) for row in log}) == 1
    assert result.training_loss == log[-1]["loss"]
    assert result.metrics["train_samples_per_second"] == pytest.approx(4 * result.metrics["train_steps_per_second"])
    assert [event for event in told.events if event[0] == "epoch"] == [("epoch", 3)]


def test_an_epoch_that_ended_before_the_checkpoint_does_not_end_again(tmp_path):
    """At 3 steps an epoch: behind step 4 of a run that has 9, the next end is that of step 6."""
    told = Told()
    events = Events([told], SFTConfig("out"))
    run = SimpleNamespace(
        **{"steps_per_epoch": 3, "total_steps": 9, "accelerator": SimpleNamespace(is_main_process=True)},
        **{"policy": SimpleNamespace(model=None), "tokenizer": None, "optimizer": None, "scheduler": None},
        checkpoint=SimpleNamespace(step=4, folder=tmp_path / "checkpoint-4"),
    )
    events.began(run)
    assert not events.stepped(5) and told.events == [] and events.state.log_history == []  # the log has gone
    assert not events.stepped(6) and told.events == [("epoch", 6)]
