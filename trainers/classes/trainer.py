"""`SFTTrainer`, `DPOTrainer`, ...: TRL's classes over the one loop, without logic of their own.

    trainer = DPOTrainer(model="Qwen/Qwen2.5-0.5B", args=DPOConfig("out", beta=0.1), train_dataset=rows)
    trainer.train()

A trainer turns its objects into options and names (`objects.py`), and its options into a run's configuration
(`trl_names`); what is trained, logged and saved is what `logratio train` would.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from logratio.losses import LOSSES

from .. import loop
from ..checkpoints.hub import push
from ..checkpoints.model import base_model, save
from ..checkpoints.output_dir import locked, model_files
from ..config import RunConfig
from ..errors import UserError
from ..evaluating import evaluate
from ..ground.given import giving
from ..ground.signals import stopping
from ..options import config_of
from ..policy.load import without_bars
from ..processes.sharding import full_weights
from ..processes.watching import ending_together
from ..setup import Run, build
from ..trl_names import names_of
from . import arguments
from .arguments import Arguments, arguments_of
from .events import Events
from .objects import NOT_TAKEN, Objects
from .signatures import takes
from .theirs import Theirs, check_subclass

CARD = frozenset("model_name dataset_name dataset dataset_tags tags language license finetuned_from tasks".split())
"""What `push_to_hub` is told for a model card."""
SHARED = (
    *("model", "args", "train_dataset", "eval_dataset", "processing_class", "tokenizer"),
    *("callbacks", "peft_config", "quantization_config"),
)


class Trainer(Theirs):
    """What TRL's trainers have in common here. Its classes differ in what they are given and in `kind`.

    model: a name, a folder, or a model of transformers, which is trained in place. args: of the class's own kind.
    train_dataset, eval_dataset: of `datasets`, lists of rows, or a name. processing_class: the tokenizer. peft_config:
    a LoraConfig; without one the whole model is trained. Raises UserError for what cannot be done, and for methods of a
    subclass that TRL's loop would call.
    """

    kind: type[Arguments]
    order: tuple[str, ...] = ("model", "args")
    """What may be given without a name, in TRL's order."""
    more: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            takes(cls, cls.order, {*SHARED, *cls.more}.difference(cls.order))

    def __init__(self, *positional: Any, **objects: Any) -> None:
        check_subclass(type(self), Trainer)
        given = self._named(positional, objects)
        args = given.pop("args", None)
        self.arguments = arguments_of(self.kind, args)
        self.args = args or self.arguments
        self.events = Events(given.pop("callbacks", None) or (), self.args)
        self.train_dataset, self.eval_dataset = given.get("train_dataset"), given.get("eval_dataset")
        self.objects = Objects()
        tokenizer = given.pop("processing_class", None) or given.get("tokenizer")
        self.objects.add_model(given.get("model"), given.get("ref_model"), tokenizer)
        formatted = given.get("formatting_func")
        self.objects.add_data(given.get("train_dataset"), given.get("eval_dataset"), formatted)
        self.objects.add_adapters(given.get("peft_config"))
        self.objects.add_quantization(given.get("quantization_config"))
        self.objects.add_rewards(given.get("reward_funcs"), given.get("reward_processing_classes"))
        self.objects.add_rollout_func(given.get("rollout_func"))
        self.config = self._configured()
        self._trained = False
        self.events.call("on_init_end")

    def _named(self, positional: tuple[Any, ...], objects: dict[str, Any]) -> dict[str, Any]:
        """All by name. TypeError as Python has it; UserError for what TRL takes and this does not."""
        name = type(self).__name__
        if len(positional) > len(self.order):
            raise TypeError(f"{name} takes {', '.join(self.order)} without a name, and all else by its name")
        given = dict(zip(self.order, positional, strict=False))
        for key, value in objects.items():
            if key in given:
                raise TypeError(f"{name} got {key} twice")
            if key in NOT_TAKEN and value not in (None, (None, None)):
                raise UserError(f"{name}: {key}= is not taken: {NOT_TAKEN[key]}")
            if key not in (*SHARED, *self.more, *NOT_TAKEN):
                option = f": it is an option of {self.kind.__name__}" if key in names_of(self.kind.method) else ""
                raise TypeError(f"{name} takes no {key}{option}")
            given[key] = value
        return given

    def _configured(self, **more: Any) -> RunConfig:
        """By the arguments, the objects, and `more`; UserError for what does not fit."""
        self._judged = judged = self.arguments.judged
        os.environ.update(judged.env)
        options = {**judged.options, **self.objects.options, **self.events.options(), **more}
        if isinstance(self.objects.options.get("dataset_name"), list) and "datasets" in options:
            raise UserError("train_dataset= and the option datasets both say what to train on; leave one of them out")
        said = io.StringIO()
        try:
            with giving({}), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):  # one thread at a time
                return config_of(judged.method, LOSSES[judged.method], options)
        except SystemExit as error:  # of the command line's parser
            lines = [line.strip(" │─╭╮╰╯") for line in said.getvalue().splitlines()]
            raise UserError(f"{self.kind.__name__}: {' '.join(filter(None, lines))}") from error

    @cached_property
    def run(self) -> Run:
        """Everything the loop works with, loaded when it is first asked for."""
        with without_bars():
            return self._built()

    def _built(self) -> Run:
        if self.arguments.judged is not self._judged:  # an option has been set since
            self.config = self._configured()
        model = self.config.model
        if self.config.keeps_start and not (model.lora_r or model.adapter_name_or_path):
            self.objects.keep_start()
        with giving(self.objects.found):
            run = build(self.config)
        run.notes += [*self.arguments.told(), *self.events.notes()]
        self.events.began(run)
        return run

    def train(self, resume_from_checkpoint: str | bool | None = None) -> Any:
        """Train, evaluate and save as the arguments say; returns transformers' TrainOutput, whose metrics are the last
        step's, the evaluation's, `train_loss`, `train_runtime` (seconds) and rates by it.

        resume_from_checkpoint: a folder, or True for the last one in output_dir. Raises UserError for bad input and
        where the loss has exploded, Stopped where a signal ended the run behind a checkpoint.
        """
        from transformers.trainer_utils import TrainOutput

        if self._trained:
            raise UserError("this trainer has trained: make a new one, with resume_from_checkpoint to go on")
        if "run" in self.__dict__ and self.arguments.judged is not self._judged:
            raise UserError("an option of args was set when the model had been asked for already: set it before")
        if resume_from_checkpoint:
            if "run" in self.__dict__:
                raise UserError("resume_from_checkpoint is for a trainer whose model has not been asked for yet")
            path = "latest" if resume_from_checkpoint is True else str(resume_from_checkpoint)
            self.config = self._configured(resume_from_checkpoint=path)
        main, began = self.is_world_process_zero(), time.monotonic()
        with without_bars(), ending_together(), locked(self.config.train.output_dir, main=main):
            run, before = self.run, len(self.state.log_history)
            self._trained = True
            self.events.call("on_train_begin")
            self.events.call("on_epoch_begin")
            with stopping() as stop:
                row = loop.train_run(
                    run, until=lambda run, row: self.events.stepped(int(row["step"])), told=self.events.told, stop=stop
                )
        self.events.call("on_train_end")
        losses = [one["loss"] for one in self.state.log_history[before:] if "loss" in one]
        loss, seconds = sum(losses) / max(1, len(losses)), time.monotonic() - began
        rate = len(losses) / seconds
        theirs = {"train_loss": loss, "train_runtime": seconds, "train_steps_per_second": rate}
        theirs["train_samples_per_second"] = rate * (run.config.train.batch_size or 0)
        return TrainOutput(self.state.global_step, loss, row | theirs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics of the trainer's eval_dataset, as eval_loss and so on; UserError where there is none, or
        another is given. ignore_keys: of outputs, which there are none of."""
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            raise UserError(
                "evaluate() is on the trainer's own eval_dataset=; `logratio eval RUN --dataset_name NAME` is on others"
            )
        if not self.run.data.evaluation:
            raise UserError("there is nothing to evaluate on: give eval_dataset=")
        metrics = evaluate(self.run, metric_key_prefix)
        self.events.call("on_evaluate", metrics=metrics)
        return metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the adapter or the model, with the tokenizer, into a folder; called on every process."""
        run, folder = self.run, Path(output_dir or self.config.train.output_dir)
        weights = full_weights(run.policy, run.accelerator)
        if run.accelerator.is_main_process:
            with without_bars(), base_model(run.config, run.policy):
                save(run.policy, run.tokenizer, folder, weights)

    def push_to_hub(self, commit_message: str = "End of training", **card: Any) -> str | None:
        """Publish what is saved in output_dir, where to as the arguments say; the address, on the main process alone.
        card: what TRL would write into a model card (dataset_name, tags, ...); `logratio report` writes one here.
        UserError where nothing is saved, the Hub does not take it, or for anything else."""
        if unknown := card.keys() - CARD:
            raise UserError(f"push_to_hub takes no {min(unknown)}: log in, and give hub_private_repo, by the arguments")
        if not self.is_world_process_zero():
            return None
        folder, options = Path(self.config.train.output_dir), self.config.save
        if not model_files(folder):
            raise UserError(f"{folder} holds no model yet: call train() or save_model() before push_to_hub()")
        return push(folder, self.hub_model_id, private=options.hub_private_repo, commit_message=commit_message)

    @property
    def state(self) -> Any:
        """transformers' TrainerState: global_step, epoch, max_steps, log_history."""
        return self.events.state

    @property
    def model(self) -> Any:
        """What trains: PEFT's model where there are adapters."""
        return self.run.policy.model

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        return self.run.tokenizer

    @property
    def accelerator(self) -> Any:
        """accelerate's, of the run."""
        return self.run.accelerator


class SFTTrainer(Trainer):
    """Supervised fine-tuning. formatting_func: makes of a row the text that is learned."""

    kind = arguments.SFTConfig
    more = ("formatting_func",)


class DPOTrainer(Trainer):
    """Direct preference optimization. ref_model: where it is not what training starts from."""

    kind = arguments.DPOConfig
    order = ("model", "ref_model", "args")
    more = ("ref_model",)


class KTOTrainer(Trainer):
    """Kahneman-Tversky optimization. ref_model: where it is not what training starts from."""

    kind = arguments.KTOConfig
    order = ("model", "ref_model", "args")
    more = ("ref_model",)


class ORPOTrainer(Trainer):
    """Odds-ratio preference optimization."""

    kind = arguments.ORPOConfig


class CPOTrainer(Trainer):
    """Contrastive preference optimization, and SimPO."""

    kind = arguments.CPOConfig


class TPOTrainer(Trainer):
    """Triple preference optimization."""

    kind = arguments.TPOConfig


class ListwiseTrainer(Trainer):
    """Lists of completions with a reward each; no counterpart in TRL. ref_model: where it is not what training starts
    from."""

    kind = arguments.ListwiseConfig
    order = ("model", "ref_model", "args")
    more = ("ref_model",)


class GRPOTrainer(Trainer):
    """Group relative policy optimization. reward_funcs: functions as TRL calls them, classifiers of transformers, or
    names of ours. reward_processing_classes: their tokenizers, where those of their files are not meant. rollout_func:
    one that makes the completions, as TRL calls it."""

    kind = arguments.GRPOConfig
    order = ("model", "reward_funcs", "args")
    more = ("reward_funcs", "reward_processing_classes", "rollout_func")


class RLOOTrainer(Trainer):
    """REINFORCE leave-one-out. reward_funcs: functions as TRL calls them, classifiers of transformers, or
    names of ours. reward_processing_classes: their tokenizers, where those of their files are not meant."""

    kind = arguments.RLOOConfig
    order = ("model", "reward_funcs", "args")
    more = ("reward_funcs", "reward_processing_classes")
