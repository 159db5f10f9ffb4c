"""Options are refused in one sentence where they cannot mean anything, and resolved as TRL resolves them."""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from typing import get_args, get_type_hints

import pytest

from logratio.losses import ADVANTAGES, KL_ESTIMATORS, LOSSES
from logratio.losses.advantages import AGGREGATIONS, SCALES
from logratio.trainers.config import ONCE, DataConfig, ModelConfig, RolloutConfig, RunConfig, SaveConfig, TrainConfig
from logratio.trainers.errors import UserError

PARTS = (ModelConfig, DataConfig, TrainConfig, SaveConfig, RolloutConfig)
FLOATS = [(part, f.name) for part in PARTS for f in dataclasses.fields(part) if isinstance(f.default, float)]
FLOATS += [(TrainConfig, "learning_rate"), (ModelConfig, "lora_alpha")]
POSITIVE = (
    *("batch_size", "per_device_train_batch_size", "gradient_accumulation_steps", "micro_batch_tokens", "max_steps"),
    *("num_train_epochs", "eval_steps"),
)
# Given at their defaults: what counts is that they were given.
UNREAD = "nothing reads this; add --lora_r 16, or leave it out"
GIVEN = {"lora_alpha": 32.0, "lora_dropout": 0.0, "lora_target_modules": ("all-linear",)}


@pytest.mark.parametrize("name", LOSSES)
def test_no_field_stands_in_two_of_the_configurations(name):
    """The command line has them all flat."""
    fields = [f.name for part in (*PARTS, LOSSES[name]) for f in dataclasses.fields(part)]
    assert len(fields) == len(set(fields)), sorted(f for f in fields if fields.count(f) > 1)
    assert not set(fields) & {"config", "loss", "help"}, "these are options of the command line itself"


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        (
            ModelConfig,
            {"load_in_4bit": True},
            "--load_in_4bit freezes the model, so something else must train: add --lora_r 16",
        ),
        (ModelConfig, {"lora_r": -1}, "--lora_r must not be negative, got -1"),
        (ModelConfig, {"lora_dropout": 1.0}, "--lora_dropout must be in [0, 1), got 1.0"),
        *(
            (
                ModelConfig,
                {name: value},
                f"--{name}: without adapters nothing reads this; add --lora_r 16, or leave it out",
            )
            for name, value in GIVEN.items()
        ),
        *(
            (
                ModelConfig,
                {name: value, "adapter_name_or_path": "some/adapter"},
                f"--{name}: these describe new adapters, and --adapter_name_or_path brings its own; leave them out",
            )
            for name, value in GIVEN.items()
        ),
        (
            ModelConfig,
            {"lora_alpha": 32.0, "lora_dropout": 0.0},
            f"--lora_alpha, --lora_dropout: without adapters {UNREAD}",
        ),
        (
            ModelConfig,
            {"lora_r": 4, "adapter_name_or_path": "some/adapter"},
            "--lora_r 4 asks for new adapters, --adapter_name_or_path some/adapter goes on with those of a run before; "
            "leave one of them out",
        ),
        *(
            (
                ModelConfig,
                {name: value},
                f"--{name}: nothing reads this without --sync_ref_model; add it, or leave this out",
            )
            for name, value in (("ref_model_mixup_alpha", 0.6), ("ref_model_sync_steps", 512))
        ),
        (DataConfig, {"max_length": 1}, "--max_length 1 leaves no room for a prompt and a completion"),
        (DataConfig, {"eval_size": -3}, "--eval_size must not be negative, got -3"),
        (
            DataConfig,
            {"eval_size": 3, "dataset_test_split": "test"},
            "--eval_size and --dataset_test_split both say what to evaluate on; give one of them",
        ),
        *((TrainConfig, {name: bad}, f"--{name} must be positive, got {bad}") for name in POSITIVE for bad in (0, -1)),
        *(
            (SaveConfig, {name: 0}, f"--{name} must be positive, got 0")
            for name in ("save_steps", "save_total_limit", "early_stopping_patience")
        ),
        (
            SaveConfig,
            {"save_total_limit": 2},
            "--save_total_limit is about checkpoints, and there are none without --save_steps",
        ),
        *(
            (
                SaveConfig,
                {name: value},
                f"--{name} is read only with --load_best_model_at_end or --early_stopping_patience",
            )
            for name, value in (("metric_for_best_model", "kl"), ("greater_is_better", False))
        ),
        *(
            (TrainConfig, {name: -1}, f"--{name} must not be negative, got -1")
            for name in ("warmup_steps", "max_grad_norm", "weight_decay", "learning_rate")
        ),
        *(
            (part, {name: bad}, f"--{name} must be finite, got {bad}")
            for part, name in FLOATS
            for bad in (float("nan"), float("inf"))
        ),
        *((TrainConfig, {"seed": bad}, f"--seed must be in [0, 4294967295], got {bad}") for bad in (-1, 2**32)),
        (ModelConfig, {"lora_alpha": 0.0}, "--lora_alpha must be positive, got 0.0"),
        (ModelConfig, {"ref_model_mixup_alpha": 1.5}, "--ref_model_mixup_alpha must be in [0, 1], got 1.5"),
        (ModelConfig, {"ref_model_sync_steps": 0}, "--ref_model_sync_steps must be positive, got 0"),
        (RolloutConfig, {"reward_weights": (float("nan"),)}, "--reward_weights must be finite, got (nan,)"),
        (RolloutConfig, {"temperature": 0.0}, "--temperature must be positive, got 0.0"),
        *((RolloutConfig, {"top_p": bad}, f"--top_p must be in (0, 1], got {bad}") for bad in (0.0, 1.1)),
        (RolloutConfig, {"num_iterations": 0}, "--num_iterations must be positive, got 0"),
        (RolloutConfig, {"reward_kl_estimator": "k3"}, "--reward_kl_estimator k3 is read only with --reward_kl_coef"),
        (RolloutConfig, {"num_generations": 1}, "--num_generations 1: a group needs at least 2 to compare"),
        (
            RolloutConfig,
            {"reward_funcs": ("a", "b"), "reward_weights": (1.0,)},
            "--reward_weights has 1 numbers for 2 --reward_funcs",
        ),
        (
            RolloutConfig,
            {"advantage_type": "best"},
            "--advantage_type best is unknown, expected one of: group, rloo, rloo_std, maxrl, passk, gpg, "
            "reinforce_pp_tokens, reinforce_pp, reinforce_pp_baseline, remax, opo, or module:function",
        ),
        (RolloutConfig, {"advantage_type": ()}, "--advantage_type names none; leave it out for group"),
        (
            RolloutConfig,
            {"advantage_type": ("group", "rloo"), "advantage_weights": (0.5,)},
            "--advantage_weights has 1 numbers for 2 --advantage_type",
        ),
        (
            RolloutConfig,
            {"advantage_type": ("math:pi",)},
            "--advantage_type math:pi must be a function of (rewards, context), but is float",
        ),
        (
            RolloutConfig,
            {"advantage_type": ("collections:Counter",)},
            "--advantage_type collections:Counter must be a function of (rewards, context), but is type",
        ),
        (
            RolloutConfig,
            {"advantage_type": ("textwrap:dedent",)},
            "--advantage_type textwrap:dedent must be a function of (rewards, context): too many positional arguments",
        ),
        (
            RolloutConfig,
            {"advantage_type": ("group", "reinforce_pp"), "dynamic_sampling": 2},
            "--dynamic_sampling 2: with --advantage_type reinforce_pp completions of equal reward teach too; leave it "
            "out",
        ),
        (
            RolloutConfig,
            {"advantage_type": "remax", "num_generations": 0},
            "--num_generations 0: a group needs at least 1 to compare",
        ),
        *(
            (
                RolloutConfig,
                {"multi_objective_aggregation": "normalize_then_sum", name: value},
                "--multi_objective_aggregation normalize_then_sum scales and whitens each reward in its own way; "
                f"leave out --{name}",
            )
            for name, value in (
                ("advantage_type", "opo"),
                ("advantage_weights", (2.0,)),
                ("scale_rewards", "none"),
                ("normalize_advantages", True),
                ("reward_kl_coef", 0.1),
            )
        ),
        (
            RolloutConfig,
            {"advantage_type": "rloo", "scale_rewards": "batch"},
            "--scale_rewards batch is an option of --advantage_type group, not of rloo",
        ),
        *(
            (
                RolloutConfig,
                {"advantage_type": kind, "normalize_advantages": True},
                f"--normalize_advantages: the advantages of {kind} are whitened already; leave it out",
            )
            for kind in ("reinforce_pp", "reinforce_pp_baseline")
        ),
        (RolloutConfig, {"reward_kl_coef": -0.1}, "--reward_kl_coef must not be negative, got -0.1"),
    ],
)
def test_what_cannot_mean_anything_is_refused(part, options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        part(**options)


def test_defaults_are_those_of_what_is_used():
    resolved = ModelConfig(lora_r=4, lora_alpha=8, sync_ref_model=True).resolved()
    assert (resolved.lora_alpha, resolved.lora_dropout, resolved.lora_target_modules) == (8, 0.0, ("all-linear",))
    assert (resolved.ref_model_mixup_alpha, resolved.ref_model_sync_steps) == (0.6, 512)
    bare = ModelConfig().resolved()
    assert bare == ModelConfig()


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("ref_model_name_or_path", "some/model", "--ref_model_name_or_path some/model"),
        ("precompute_ref_log_probs", True, "--precompute_ref_log_probs"),
        ("sync_ref_model", True, "--sync_ref_model"),
    ],
)
def test_options_of_a_reference_need_one(option, value, shown):
    for method in ("sft", "orpo", "grpo"):
        message = f"{shown} is about the reference, but this {method} has none; leave it out"
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            RunConfig(method=method, loss=LOSSES[method](), model=ModelConfig(**{option: value}))
    RunConfig(method="dpo", loss=LOSSES["dpo"](), model=ModelConfig(**{option: value}))
    RunConfig(method="grpo", loss=LOSSES["grpo"](beta=0.1), model=ModelConfig(**{option: value}))


def test_rollouts_have_defaults_where_a_script_names_none():
    config = RunConfig(method="grpo", loss=LOSSES["grpo"]())
    assert config.resolved(1) == RunConfig(method="grpo", loss=config.loss, rollout=RolloutConfig()).resolved(1)
    assert RunConfig(method="dpo", loss=LOSSES["dpo"]()).resolved(1).rollout is None


def test_evaluation_needs_something_to_evaluate_on():
    parts = {"method": "dpo", "loss": LOSSES["dpo"](), "train": TrainConfig(eval_steps=5)}
    message = "--eval_steps 5 has nothing to evaluate on: add --eval_size or --dataset_test_split"
    with pytest.raises(UserError, match=f"^{message}$"):
        RunConfig(**parts)
    for data in (DataConfig(eval_size=1), DataConfig(dataset_test_split="test")):
        assert RunConfig(**parts, data=data).train.eval_steps == 5
    rollouts = {"method": "grpo", "loss": LOSSES["grpo"](), "rollout": RolloutConfig(num_generations_eval=4)}
    message = "--num_generations_eval 4 is of evaluations, and there is nothing to evaluate on: add --eval_size or "
    with pytest.raises(UserError, match=f"^{message}--dataset_test_split$"):
        RunConfig(**rollouts)
    assert RunConfig(**rollouts, data=DataConfig(eval_size=1)).rollout.num_generations_eval == 4


@pytest.mark.parametrize("option", [{"load_best_model_at_end": True}, {"early_stopping_patience": 2}])
def test_evaluations_of_rollouts_have_no_loss_to_compare(option):
    parts = {"method": "grpo", "loss": LOSSES["grpo"](), "rollout": RolloutConfig()}
    parts |= {"train": TrainConfig(eval_steps=5), "data": DataConfig(eval_size=1)}
    message = "^evaluations of rollouts have no loss to compare: add --metric_for_best_model reward, or another metric"
    for metric in (None, "loss", "eval_loss"):
        with pytest.raises(UserError, match=message):
            RunConfig(**parts, save=SaveConfig(**option, metric_for_best_model=metric))
    assert RunConfig(**parts, save=SaveConfig(**option, metric_for_best_model="reward")).save.metric == "eval_reward"


def test_adapters_of_either_kind_allow_4_bit():
    assert ModelConfig(load_in_4bit=True, lora_r=8).load_in_4bit
    assert ModelConfig(load_in_4bit=True, adapter_name_or_path="somewhere").load_in_4bit


@pytest.mark.parametrize(
    ("options", "processes", "expected"),
    [
        ({}, 1, 8),
        ({}, 4, 8),
        ({"batch_size": 6}, 3, 6),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 3, 24),
        ({"per_device_train_batch_size": 4}, 2, 8),
        ({"gradient_accumulation_steps": 2}, 1, 16),
        ({"batch_size": 24, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 3, 24),
    ],
)
def test_batch_size_is_what_a_step_has_over_all_processes(options, processes, expected):
    assert TrainConfig(**options).resolved("dpo", processes).batch_size == expected


def test_two_different_batch_sizes_contradict_each_other():
    message = (
        "--batch_size 8 contradicts per_device_train_batch_size x gradient_accumulation_steps x processes = 12; "
        "give one or the other"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        TrainConfig(batch_size=8, per_device_train_batch_size=2, gradient_accumulation_steps=3).resolved("dpo", 2)


def test_learning_rates_default_to_trls_by_method_and_zero_is_a_rate():
    assert TrainConfig().resolved("sft", 1).learning_rate == 2e-5
    assert TrainConfig().resolved("tpo", 1).learning_rate == 5e-7
    for method in ("dpo", "kto", "orpo", "grpo", "custom"):
        assert TrainConfig().resolved(method, 1).learning_rate == 1e-6
    assert TrainConfig(learning_rate=0.0).resolved("sft", 1).learning_rate == 0.0


def test_as_dict_is_plain_and_complete():
    config = RunConfig(method="grpo", loss=LOSSES["grpo"](beta=0.5), rollout=RolloutConfig())
    values = config.as_dict()
    assert values.keys() == {"method", "loss_class", "loss", "model", "data", "train", "save", "rollout"}
    assert values["loss"]["beta"] == 0.5 and values["method"] == values["loss_class"] == "grpo"
    for name, part in (
        ("model", ModelConfig),
        ("data", DataConfig),
        ("train", TrainConfig),
        ("save", SaveConfig),
        ("rollout", RolloutConfig),
    ):
        assert values[name].keys() == {f.name for f in dataclasses.fields(part)} - ONCE
    assert RunConfig(method="sft", loss=LOSSES["sft"]()).as_dict()["rollout"] is None


@pytest.mark.parametrize(("coef", "beta", "wanted"), [(0.0, 0.0, False), (0.1, 0.0, True), (0.0, 0.1, True)])
def test_a_reference_is_wanted_by_the_loss_or_by_the_rewards(coef, beta, wanted):
    loss = LOSSES["grpo"](beta=beta)
    config = RunConfig(method="grpo", loss=loss, rollout=RolloutConfig(reward_kl_coef=coef))
    assert config.wants_reference is wanted
    assert RunConfig(method="dpo", loss=LOSSES["dpo"]()).wants_reference
    assert not RunConfig(method="sft", loss=LOSSES["sft"]()).wants_reference


def test_every_choice_has_its_formula():
    hints = get_type_hints(RolloutConfig)
    assert set(get_args(hints["multi_objective_aggregation"])) == set(AGGREGATIONS)
    assert set(get_args(hints["scale_rewards"])) == set(SCALES)
    assert set(get_args(hints["reward_kl_estimator"])) == set(KL_ESTIMATORS) - {"k3+", "abs"}  # k3 in value; of losses
    for kind, needs in ADVANTAGES.items():
        assert RolloutConfig(advantage_type=kind, num_generations=needs.smallest_group)


@pytest.mark.parametrize("part", [*PARTS, *LOSSES.values()])
def test_every_option_has_its_help(part):
    """The text behind a field is its help and its only documentation."""
    (cls,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
    helped = {
        node.target.id
        for node, following in itertools.pairwise(cls.body)
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr) and following.value.value.strip()
    }
    assert helped >= {f.name for f in dataclasses.fields(part)}
