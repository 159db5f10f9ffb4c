"""Every option that the installed TRL has is known: its fields are gone through, not a list of them."""

import dataclasses
import itertools

import pytest

pytest.importorskip("trl")

from logratio.benchmarks.trl_options import trl_classes
from logratio.losses import LOSSES
from logratio.trainers.config import RolloutConfig, RunConfig, parts_of
from logratio.trainers.trl_names import TRL_DEFAULTS, Kind, consider
from logratio.trainers.trl_names.judging import REASONS, options_of
from logratio.trainers.trl_names.rules import RULES
from logratio.trainers.trl_names.table import ONLY, OURS, RENAMED

from ._judged import judge

CLASSES = trl_classes()
METHODS = list(CLASSES)
SAME = {
    # None here is filled in with the same number where it is read
    *("cpo_alpha", "epsilon", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    "report_to",  # "none", alone or in a tuple
    "optim",  # the same algorithm
    "loss_type",  # a list there, a tuple here; RLOO's is chosen
    *("max_steps", "dataset_num_proc", "gradient_accumulation_steps"),  # -1, None and 1 say what None, 1 and None do
    "steps_per_generation",  # None, which becomes gradient_accumulation_steps, is one optimizer step, as 1 here
}
UNKNOWN = "no option here, nor of TRL"


def default(field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def defaults_of(method):
    return {f.name: default(f) for part in CLASSES[method] for f in dataclasses.fields(part)}


def resolved(method):
    """Our defaults of a method of TRL, with what depends on other options filled in."""
    ours = "grpo" if method == "rloo" else method
    loss = LOSSES[ours]()
    run = RunConfig(method=ours, loss=loss, rollout=RolloutConfig() if "rollout" in parts_of(LOSSES[ours]) else None)
    run = run.resolved(1)
    parts = [part for part in vars(run).values() if dataclasses.is_dataclass(part)]
    return {f.name: getattr(part, f.name) for part in parts for f in dataclasses.fields(part)}


@pytest.mark.parametrize("method", METHODS)
def test_every_option_is_judged(method):
    """At its default, and at what it cannot be."""
    for value in (None, "no such value"):
        judged = consider(method, dict.fromkeys(defaults_of(method), value))
        assert {v.key for v in judged.verdicts} == defaults_of(method).keys()
        assert [v.key for v in judged.verdicts if UNKNOWN in v.reason] == []


@pytest.mark.parametrize("method", METHODS)
def test_all_of_trls_defaults_spelled_out_are_accepted(method):
    """And become our own defaults, but for those of `TRL_DEFAULTS`."""
    options = judge(method, defaults_of(method)).options
    ours, theirs = resolved(method), TRL_DEFAULTS[method]
    for name in options.keys() - SAME - theirs.keys() - {"reward_kl_coef", "shuffle", "advantage_type"}:
        assert options[name] == ours[name], name
    assert options["shuffle"] is (theirs.get("train_sampling_strategy", "random") == "random")
    assert options.get("save_steps") == theirs["save_steps"] and "lora_r" not in options
    if method == "rloo":
        chosen = {"loss_type": "rloo", "advantage_type": "rloo", "reward_kl_coef": theirs["beta"]}
        assert chosen.items() <= options.items()


@pytest.mark.parametrize("method", METHODS)
def test_the_defaults_that_differ_are_trls_and_all_of_them(method):
    config = CLASSES[method][0]
    theirs = {f.name: default(f) for f in dataclasses.fields(config)}
    theirs["bf16"] = config(output_dir="nowhere", use_cpu=True).bf16  # None until it is made
    theirs["output_dir"] = config(use_cpu=True).output_dir
    stated = TRL_DEFAULTS[method]
    assert {name: theirs[name] for name in stated} == stated
    ours = resolved(method)
    differ = {name for name in theirs.keys() & ours.keys() if theirs[name] != ours[name]}
    assert differ - SAME == stated.keys() - {"bf16", "train_sampling_strategy"}
    assert (theirs["train_sampling_strategy"] != "random") == ("train_sampling_strategy" in stated)


def test_nothing_stands_in_the_tables_twice_or_in_vain():
    """What a rule or a table says of an option that all methods have by the same name would never be read."""
    tables = (RULES.keys(), ONLY.keys(), REASONS.keys(), RENAMED.keys())
    for one, other in itertools.combinations(tables, 2):
        assert not one & other
    common = set.intersection(*(set(options_of(loss)) for loss in LOSSES.values()))
    assert not common & (ONLY.keys() | REASONS.keys() | RENAMED.keys()), "there is an option of that name: remove it"
    known = RULES.keys() | ONLY.keys() | REASONS.keys() | set().union(*map(options_of, LOSSES.values()))
    assert set(RENAMED.values()) <= known


def test_our_own_options_are_not_trls():
    theirs = set().union(*(defaults_of(method) for method in METHODS))
    ours = set().union(*map(options_of, LOSSES.values()))
    assert not OURS & theirs and OURS <= ours


ODD = [None, True, False, 0, -1, 1.5, float("nan"), "", "x", "1e-5", [], ["x"], [["x"]], [{"a": 1}], {}, {"a": 1}]


@pytest.mark.parametrize("method", ["sft", "dpo", "rloo"])
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_no_value_is_too_odd_to_be_judged(method, value):
    names = [*RULES, *ONLY, *REASONS, *RENAMED, *options_of(LOSSES["grpo"]), *options_of(LOSSES["dpo"])]
    for name in {*names, "model_init_kwargs", "env", 3, "no-such-option"}:
        (verdict,) = consider(method, {name: value}).verdicts or [None]
        assert verdict is None or isinstance(verdict.kind, Kind)
