"""Options of the data."""

from __future__ import annotations

from .rules import rule
from .verdicts import Asked, Verdict

NO_LIMIT = 2**31 - 1


@rule("dataset_name", "dataset_config", "dataset_train_split")
def one_data_set(a: Asked) -> Verdict:
    """As here; without effect beside datasets."""
    if a.says("datasets") and not a.ours:
        return a.no_effect("datasets say what to train on, in TRL too")
    return a.taken()


@rule("datasets")
def several(a: Asked) -> Verdict:
    """As here, without data_dir and data_files."""
    return a.taken() if a.value else a.no_effect("none are listed")


@rule("dataset_test_split")
def evaluated_on(a: Asked) -> Verdict:
    """As here, with eval_strategy steps or epoch; without it TRL does not evaluate, and nor does this run."""
    if splits(a):
        return a.no_effect("test_split_size says what to evaluate on")
    if evaluates(a):
        return a.taken()
    return a.no_effect("TRL evaluates only with eval_strategy: steps or epoch, and so does this run")


def evaluates(a: Asked) -> bool:
    strategy = a.says("eval_strategy", "steps" if a.ours else "no")
    return str(strategy).lower() not in ("no", "false")


@rule("test_split_size")
def held_out(a: Asked) -> Verdict:
    """With datasets: eval_size, rows or below 1 a share of them; else without effect, as in TRL."""
    if not splits(a):
        return a.no_effect("TRL reads it only with datasets; eval_size holds rows out")
    return a.translated(eval_size=a.number())


def splits(a: Asked) -> bool:
    """Whether rows of the training data are held out."""
    return bool(a.says("datasets") and a.says("test_split_size"))


@rule("max_length")
def longest(a: Asked) -> Verdict:
    """As here; null: no limit."""
    if a.value is None:
        return a.translated("no limit", max_length=NO_LIMIT)
    return a.taken()


@rule("train_sampling_strategy")
def order(a: Asked) -> Verdict:
    """random: shuffle; sequential: no-shuffle; group_by_length: shuffle, since rows are packed by length anyway."""
    value = {True: "group_by_length", False: "random"}.get(a.value, a.value)
    if value not in ("random", "sequential", "group_by_length"):
        return a.refused("must be random, sequential or group_by_length")
    reason = "micro-batches are packed by the rows' lengths in any case" if value == "group_by_length" else ""
    return a.translated(reason, shuffle=value != "sequential")


@rule("shuffle_dataset")
def shuffled(a: Asked) -> Verdict:
    """GRPO and RLOO: shuffle or no-shuffle; else without effect, since every epoch has an order of its own."""
    if a.method in ("grpo", "rloo"):
        return a.translated(shuffle=bool(a.value))
    return a.no_effect("rows are shuffled in every epoch, as TRL's trainer does whatever this says")
