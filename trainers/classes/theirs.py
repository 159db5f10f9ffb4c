"""What scripts find in transformers' and TRL's trainers beside `train`: what is there too, and what is said where not.

Nothing of a subclass's is called by the loop, so what it would have changed in theirs is refused, not passed over.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..trl_names import names_of

LOSS = (
    "a loss of your own is a class that is given log-probabilities (docs/laws.md): "
    "`logratio train METHOD --loss module:Class`"
)
ROLLOUT = "completions of your own come from rollout_func= (docs/rollouts.md)"
LOOP = "a loop of your own calls `Step` (docs/start/python.md)"
ROWS = "rows are read and packed by the trainer: change them with train_dataset.map beforehand"
METRICS = "a reward logs by log_metric and log_extra, a loss by the metrics that it returns"
TRLS = {
    **dict.fromkeys(("_compute_loss", "compute_loss", "odds_ratio_loss", "cpo_loss", "get_batch_loss_metrics"), LOSS),
    **dict.fromkeys(("concatenated_forward", "concatenated_inputs", "get_batch_logps"), LOSS),
    **dict.fromkeys(("get_gamma_weights", "get_high_entropy_mask", "get_off_policy_mask"), LOSS),
    **dict.fromkeys(("_get_per_token_logps_and_entropies", "_shift_right", "_compute_kl_logps"), LOSS),
    **dict.fromkeys(("compute_ref_log_probs", "_precompute_ref_logps"), "the reference is given by ref_model="),
    **dict.fromkeys(("_generate", "_generate_and_score_completions", "_generate_single_turn"), ROLLOUT),
    **dict.fromkeys(("_tool_call_loop", "_get_tool_suffix_ids", "_tokenize_prompts", "generate_from_model"), ROLLOUT),
    **dict.fromkeys(("_prepare_dataset", "_reject_skip_prepare_without_labels"), ROWS),
    **dict.fromkeys(("build_tokenized_answer", "tokenize_row", "get_train_dataloader", "get_eval_dataloader"), ROWS),
    **dict.fromkeys(("_log_completion_extra", "_log_metric", "store_metrics", "log"), METRICS),
    "_calculate_rewards": "rewards are functions or models: reward_funcs=",
    "_send_telemetry": "nothing is sent",
    "optimizer": "it is run.optimizer",
    "lr_scheduler": "it is run.scheduler",
    "ref_model": "it is in run.step.reference",
    "model_wrapped": "it is run.policy",
    "callback_handler": "callbacks come by add_callback and go by remove_callback",
    "control": "a callback sets should_training_stop in the control that it is given",
    **dict.fromkeys(("reward_funcs", "reward_func_names"), "they are in run.rollouts"),
    **dict.fromkeys(("data_collator", "label_names"), ROWS),
    **dict.fromkeys(("compute_loss_func", "label_smoother"), LOSS),
}
"""What TRL 1.16's trainers have and ours not -> what does in its place."""
CALLED = {
    "evaluate": "an evaluation's metrics go to a callback's on_evaluate",
    "save_model": "a checkpoint is told to a callback's on_save",
}
"""What ours have too, where TRL's loop calls a subclass's and this one none -> what does in its place."""
OF_NO_EFFECT = ("_name", "_paper", "_tag_names", "_template_file", "loss_is_scaled_for_ga")
"""What TRL's classes tell of themselves, in model cards and to transformers' loop, which a subclass may tell too."""


OWN = frozenset("args arguments config events objects state train_dataset eval_dataset kind order more run".split())
"""Of our trainers, where theirs have something of the name too, or an option has it."""


class Theirs:
    """What a script does beside `train`, as transformers' trainers do it."""

    accelerator: Any
    args: Any
    arguments: Any
    config: Any
    events: Any
    kind: Any
    processing_class: Any
    state: Any
    _configured: Any
    is_fsdp_enabled = is_deepspeed_enabled = False
    """Scripts ask for them to gather the weights before `save_model`, which does so by itself."""

    def is_world_process_zero(self) -> bool:
        """Whether this is the main process."""
        return os.environ.get("RANK", "0") == "0"

    def is_local_process_zero(self) -> bool:
        """Whether this is the first process of its machine."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    @property
    def hub_model_id(self) -> str:
        """The name under which `push_to_hub` publishes."""
        named = self.arguments.given.get("hub_model_id")  # which the run itself reads only where it is to push
        return self.config.save.hub_model_id or named or Path(self.config.train.output_dir).resolve().name

    @property
    def tokenizer(self) -> Any:
        """`processing_class`, by its older name."""
        return self.processing_class

    def add_callback(self, callback: Any) -> None:
        """One more callback, before training."""
        early = len(self.events.early)
        self.events.add(callback)
        if len(self.events.early) > early:
            if "run" in self.__dict__:
                raise UserError("EarlyStoppingCallback: the model has been asked for already; give callbacks= with it")
            self.config = self._configured()

    def pop_callback(self, callback: Any) -> Any:
        """Take out a callback, or the first of a class, and return it; None where there is none."""
        return self.events.pop(callback)

    def remove_callback(self, callback: Any) -> None:
        """Take out a callback, or the first of a class, where there is one."""
        self.events.pop(callback)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Say on the main process what writes a model card here; what TRL's would hold is not read."""
        if self.is_world_process_zero():
            print(f"no model card is written: `logratio report {self.config.train.output_dir}` writes one of the run")

    def end(self) -> None:
        """Leave the other processes, as the last thing of a script. The trackers have been finished by `train`."""
        if "run" in self.__dict__:
            self.accelerator.end_training()

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """Print them, on the main process."""
        if self.is_world_process_zero():
            print(f"***** {split} metrics *****")
            for name in sorted(metrics):
                print(f"  {name} = {metrics[name]}")

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Into SPLIT_results.json of output_dir, and with `combined` into all_results.json, beside what is there."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.config.train.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        everything = folder / "all_results.json"
        known = json.loads(everything.read_text()) if everything.exists() else {}
        files = {f"{split}_results.json": metrics} | ({everything.name: known | metrics} if combined else {})
        for name, what in files.items():
            (folder / name).write_text(json.dumps(what, indent=4, sort_keys=True) + "\n")

    def save_state(self) -> None:
        """The TrainerState, into trainer_state.json of output_dir; `resume_from_checkpoint` does not need it."""
        if self.is_world_process_zero():
            folder = Path(self.config.train.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property has raised an AttributeError of its own, which is the one to see
            return object.__getattribute__(self, name)
        if why := self._instead(name):
            raise AttributeError(f"{type(self).__name__} has no {name!r}, as TRL's has: {why}")
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        late = name in ("args", "train_dataset", "eval_dataset") and name in self.__dict__
        if late or (name not in OWN and (why := self._instead(name))):
            why = "it is given when the trainer is made" if late else why
            raise UserError(f"{type(self).__name__}: {name} is set on the trainer, where nothing reads it: {why}")
        object.__setattr__(self, name, value)

    def _instead(self, name: str) -> str:
        """What is in the place of what TRL's trainers have under a name; "" where they have nothing."""
        if name in TRLS or (not name.startswith("_") and name in theirs()):
            return (TRLS | CALLED).get(name, LOOP)
        return f"it is args.{name}, an option" if name in names_of(self.kind.method) else ""


def theirs() -> frozenset[str]:
    """All that transformers' Trainer has."""
    from transformers import Trainer

    return frozenset(dir(Trainer))


def check_subclass(cls: type, own: type) -> None:
    """Raise UserError where a class has methods that TRL's loop would call and ours does not. own: our class, of which
    it is one."""
    for one in cls.__mro__[: cls.__mro__.index(own)]:
        for name in vars(one):
            if name in OF_NO_EFFECT or name.startswith("__") or (hasattr(own, name) and name not in CALLED):
                continue
            if name in CALLED or name in TRLS or name in theirs():
                instead = (CALLED | TRLS).get(name, LOOP)
                raise UserError(f"{one.__name__} has its own {name!r}, which nothing here calls: {instead}")
