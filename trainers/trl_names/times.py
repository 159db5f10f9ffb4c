"""When a run evaluates and saves, and where to."""

from __future__ import annotations

import dataclasses
from typing import Any

from .data import evaluates, splits
from .rules import rule
from .verdicts import Asked, Verdict, number

LOGGING_STEPS, SAVE_STEPS, EPOCHS = 10, 500, 3.0
"""TRL's defaults of logging_steps, save_steps and num_train_epochs."""


def share_of_epoch(a: Asked) -> float | None:
    """What part of the run an epoch is; None where that is not known beforehand."""
    steps = a.says("max_steps")
    return None if steps and number(steps) > 0 else 1 / number(a.says("num_train_epochs", EPOCHS))


UNKNOWN = "with max_steps it is not known when an epoch ends: at the end of the run alone; {} says otherwise"


@rule("eval_strategy")
def evaluation(a: Asked) -> Verdict:
    """no: none on the way; steps: every eval_steps (default: logging_steps, 10); epoch: at the end of each. On
    dataset_test_split (default: test), or the rows of test_split_size."""
    strategy = str(a.value).lower()
    if not evaluates(a):
        return a.no_effect("nothing is evaluated on the way")
    if strategy not in ("steps", "epoch"):
        return a.refused("must be no, steps or epoch")
    became: dict[str, Any] = {}
    reason = ""
    if strategy == "steps":
        became = {"eval_steps": number(a.says("eval_steps", a.says("logging_steps", LOGGING_STEPS)))}
    elif (share := share_of_epoch(a)) is None:
        reason = UNKNOWN.format("eval_strategy: steps")
    else:
        became = {"eval_steps": share} if share < 1 else {}
        reason = "at the end of each epoch, and of the run"
    if not (a.says("eval_size") or a.says("dataset_test_split") or splits(a)):
        became["dataset_test_split"] = "test"
    return a.translated(reason, **became)


@rule("eval_steps")
def eval_steps(a: Asked) -> Verdict:
    """As here with eval_strategy: steps, else without effect."""
    if not evaluates(a):
        return a.no_effect("TRL evaluates only with eval_strategy: steps or epoch, and so does this run")
    return a.no_effect("eval_strategy: epoch says when") if a.says("eval_strategy") == "epoch" else a.taken()


@rule("save_strategy")
def saving(a: Asked) -> Verdict:
    """no: the trained model alone; steps: a checkpoint every save_steps (default: 500); epoch: at the end of each."""
    strategy = str(a.value).lower()
    if strategy in ("no", "false"):
        return a.no_effect("no checkpoints on the way, as by default; the trained model is saved")
    if strategy == "steps":
        return a.translated(save_steps=number(a.says("save_steps", SAVE_STEPS)))
    if strategy == "best":
        return a.refused("load_best_model_at_end: true keeps the checkpoint of the best evaluation")
    if strategy != "epoch":
        return a.refused("must be no, steps or epoch")
    share = share_of_epoch(a)
    if share is None:
        return a.no_effect(UNKNOWN.format("save_strategy: steps"))
    if share >= 1:
        return a.no_effect("the only epoch ends with the run, whose trained model is saved")
    return a.translated("at the end of each epoch", save_steps=share)


def saves(a: Asked) -> str:
    return str(a.says("save_strategy", "steps")).lower().replace("false", "no")


@rule("save_steps")
def save_steps(a: Asked) -> Verdict:
    """As here, unless save_strategy is no or epoch."""
    return a.taken() if saves(a) == "steps" else a.no_effect(f"save_strategy: {saves(a)} says when")


@rule("save_total_limit")
def limit(a: Asked) -> Verdict:
    """As here; where nothing says when checkpoints are left, every 500 steps, TRL's default."""
    if saves(a) == "no" and not a.says("load_best_model_at_end"):
        return a.no_effect("there are no checkpoints")
    if saves(a) == "epoch" and (share_of_epoch(a) or 1) >= 1 and not a.says("load_best_model_at_end"):
        return a.no_effect("there are no checkpoints on the way")
    if a.says("save_steps") or a.says("save_strategy") or a.says("load_best_model_at_end") or a.ours:
        return a.taken()
    return a.translated("with TRL's default of save_steps", save_total_limit=a.value, save_steps=SAVE_STEPS)


@rule("metric_for_best_model", "greater_is_better")
def best(a: Asked) -> Verdict:
    """As here with load_best_model_at_end (or early_stopping_patience), else without effect."""
    if a.says("load_best_model_at_end") or a.says("early_stopping_patience"):
        return a.taken()
    return a.no_effect("evaluations are compared only with load_best_model_at_end: true")


@rule("resume_from_checkpoint")
def resume(a: Asked) -> Verdict:
    """true: latest; false: not; a folder as here."""
    if a.value is True or str(a.value).lower() == "true":
        return a.translated(resume_from_checkpoint="latest")
    if not a.value or str(a.value).lower() == "false":
        return a.no_effect("the run starts anew")
    return a.taken("a folder that a run of ours left")


@rule("hub_model_id", "hub_private_repo")
def repository(a: Asked) -> Verdict:
    """As here, with push_to_hub: true; without it nothing is pushed, in TRL neither."""
    return a.taken() if a.says("push_to_hub") else a.no_effect("read only with push_to_hub")


@rule("hub_token")
def token(a: Asked) -> Verdict:
    """The variable HF_TOKEN, with push_to_hub: true. It is not shown."""
    hidden = dataclasses.replace(a, value="...")
    if not a.says("push_to_hub"):
        return hidden.no_effect("read only with push_to_hub")
    return dataclasses.replace(hidden.translated("as the variable HF_TOKEN"), env={"HF_TOKEN": str(a.value)})
