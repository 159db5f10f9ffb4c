"""What scripts find in transformers' and TRL's trainers beside `train`: what is there too, and what is said where not.

Nothing of a subclass's is called by the loop, so what it would have changed in theirs is refused, not passed over.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError

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
    "create_model_card": "`logratio report RUN` writes one",
    "_send_telemetry": "nothing is sent",
    "optimizer": "it is run.optimizer",
    "lr_scheduler": "it is run.scheduler",
    "ref_model": "it is in run.step.reference",
}
"""What TRL 1.16's trainers have and ours not -> what does in its place."""
CALLED = {
    "evaluate": "an evaluation's metrics go to a callback's on_evaluate",
    "save_model": "a checkpoint is told to a callback's on_save",
}
"""What ours have too, where TRL's loop calls a subclass's and this one none -> what does in its place."""
OF_NO_EFFECT = ("_name", "_paper", "_tag_names", "_template_file")
"""What TRL's classes tell of themselves in model cards, which a subclass may tell too."""


class Theirs:
    """What a script does behind `train`, as transformers' trainers do it."""

    args: Any
    config: Any
    state: Any

    def is_world_process_zero(self) -> bool:
        """Whether this is the main process."""
        return os.environ.get("RANK", "0") == "0"

    def is_local_process_zero(self) -> bool:
        """Whether this is the first process of its machine."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    @property
    def hub_model_id(self) -> str:
        """The name under which `push_to_hub` publishes."""
        named = self.args.given.get("hub_model_id")  # which the run itself reads only where it is to push
        return self.config.save.hub_model_id or named or Path(self.config.train.output_dir).resolve().name

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
        if name in TRLS or (not name.startswith("_") and name in theirs()):
            raise AttributeError(f"{type(self).__name__} has no {name!r}, as TRL's has: {TRLS.get(name, LOOP)}")
        raise AttributeError(f"{type(self).__name__} has no {name!r}")


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
