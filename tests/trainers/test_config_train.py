"""What transformers and TRL mean by a number of steps, a schedule and a batch is what is meant here."""

import re

import pytest

from logratio.losses import LOSSES
from logratio.trainers.config import DataConfig, RolloutConfig, RunConfig, SaveConfig, TrainConfig
from logratio.trainers.config.numbers import number_of
from logratio.trainers.errors import UserError


@pytest.mark.parametrize(
    ("options", "processes", "completions", "prompts"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 1, 8, 1),
        ({"per_device_train_batch_size": 4}, 4, 8, 2),
        ({"gradient_accumulation_steps": 3}, 1, 4, 6),
        ({"batch_size": 5}, 1, 8, 5),
        ({}, 4, 8, 8),
    ],
)
def test_where_completions_are_sampled_trls_spelling_counts_them(options, processes, completions, prompts):
    run = RunConfig(
        method="grpo",
        loss=LOSSES["grpo"](),
        train=TrainConfig(**options),
        rollout=RolloutConfig(num_generations=completions),
    )
    assert run.resolved(processes).train.batch_size == prompts


def test_a_step_of_no_whole_number_of_groups_is_refused():
    message = (
        "per_device_train_batch_size x gradient_accumulation_steps x processes = 12 completions, as TRL counts them, "
        "are no whole number of groups of --num_generations 8; make it a multiple, or give --batch_size, the prompts "
        "of a step"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        TrainConfig(per_device_train_batch_size=4).resolved("grpo", 3, 8)
    message = (
        "--batch_size 8 contradicts per_device_train_batch_size x gradient_accumulation_steps x processes / "
        "num_generations 4 = 2; give one or the other"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        TrainConfig(batch_size=8, per_device_train_batch_size=8).resolved("grpo", 1, 4)


@pytest.mark.parametrize(
    ("steps", "total", "number"),
    [
        (None, 10, None),
        (0, 10, 0),
        (3, 10, 3),
        (1, 10, 1),
        (0.25, 10, 3),
        (0.1, 30, 3),
        (1 / 3, 300, 100),
        (1 / 7, 49, 7),
    ],
)
def test_below_one_it_is_a_share_rounded_up(steps, total, number):
    assert number_of(steps, total) == number


@pytest.mark.parametrize(
    ("part", "name"),
    [(TrainConfig, "warmup_steps"), (TrainConfig, "eval_steps"), (SaveConfig, "save_steps"), (DataConfig, "eval_size")],
)
def test_a_number_that_is_no_share_is_whole(part, name):
    assert getattr(part(**{name: 2}), name) == 2 and getattr(part(**{name: 0.5}), name) == 0.5
    with pytest.raises(UserError, match=f"^--{name} 2.5 must be a whole number, or a share below 1$"):
        part(**{name: 2.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 5},
            "--warmup_steps 5 is not read by --lr_scheduler_type constant; take constant_with_warmup, or leave it out",
        ),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": '{"a": 1}'},
            '--lr_scheduler_kwargs {"a": 1} is not read by --lr_scheduler_type constant; take constant_with_warmup, '
            "or leave it out",
        ),
        ({"lr_scheduler_kwargs": "[1]"}, "--lr_scheduler_kwargs [1] is no JSON object"),
        ({"lr_scheduler_kwargs": "{"}, "--lr_scheduler_kwargs { is no JSON object"),
    ],
)
def test_a_schedule_is_given_what_it_reads(options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        TrainConfig(**options)


def test_options_of_a_schedule_are_the_same_as_a_mapping_and_as_text():
    one, other = TrainConfig(lr_scheduler_kwargs={"power": 2}), TrainConfig(lr_scheduler_kwargs='{"power": 2}')
    assert one == other and one.schedule_options == {"power": 2} and TrainConfig().schedule_options == {}
