"""The learning rate's schedules are transformers', and AdamW's numbers those that are given."""

from typing import get_args

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType

from logratio.trainers.config import TrainConfig
from logratio.trainers.config.train import Schedule
from logratio.trainers.errors import UserError
from logratio.trainers.optimizer import make_optimizer, make_schedule

KWARGS = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
}
FOLLOW_A_METRIC = {"reduce_lr_on_plateau", "greedy"}


def rates_of(scheduler, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", get_args(Schedule))
def test_every_schedule_is_transformers(name, tmp_path):
    """With a tenth of 12 steps, two, as its Trainer has it."""
    share, options = 0 if name == "constant" else 0.1, KWARGS.get(name, {})
    found = []
    for make in (
        lambda optimizer: make_schedule(
            optimizer, TrainConfig(lr_scheduler_type=name, warmup_steps=share, lr_scheduler_kwargs=options or None), 12
        ),
        lambda optimizer: Trainer(
            torch.nn.Linear(1, 1),
            TrainingArguments(
                str(tmp_path), lr_scheduler_type=name, warmup_steps=share, lr_scheduler_kwargs=options, use_cpu=True
            ),
            optimizers=(optimizer, None),
        ).create_scheduler(12, optimizer),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
        found.append(rates_of(make(optimizer), optimizer, 12))
    assert found[0] == found[1] and max(found[0]) == pytest.approx(0.01)
    assert (found[0][0] < 0.01) == bool(share)


def test_every_schedule_of_transformers_is_known():
    assert {kind.value for kind in SchedulerType} == {*get_args(Schedule), *FOLLOW_A_METRIC}


def test_a_share_of_warm_up_leaves_the_last_step_its_rate():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = make_schedule(optimizer, TrainConfig(warmup_steps=0.1), 1)
    assert rates_of(scheduler, optimizer, 1) == [0.01]


def test_an_option_that_a_schedule_has_not_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    message = r"^--lr_scheduler_type cosine: .*unexpected keyword argument 'power'; see --lr_scheduler_kwargs$"
    config = TrainConfig(lr_scheduler_type="cosine", lr_scheduler_kwargs='{"power": 2}')
    with pytest.raises(UserError, match=message):
        make_schedule(optimizer, config, 10)
    with pytest.raises(
        UserError, match=r"^--lr_scheduler_type cosine_with_min_lr: .*min_lr.*see --lr_scheduler_kwargs$"
    ):
        make_schedule(optimizer, TrainConfig(lr_scheduler_type="cosine_with_min_lr"), 10)


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        # -lr m / (sqrt(v) + eps), both unbiased, of gradients 2 and then 0
        ({}, 2 / (2 + 1e-8), (0.9 * 0.2 / 0.19) / (0.999 * 0.004 / 0.001999) ** 0.5),
        ({"adam_epsilon": 0.5}, 2 / 2.5, (0.18 / 0.19) / ((0.999 * 0.004 / 0.001999) ** 0.5 + 0.5)),
        ({"adam_beta1": 0.0, "adam_beta2": 0.5}, 1.0, 0.0),  # without momentum the second moves nothing
        ({"adam_beta1": 0.5, "adam_beta2": 0.5}, 1.0, (0.5 / 0.75) / (1.0 / 0.75) ** 0.5),
    ],
)
def test_adams_numbers_are_those_that_are_given(options, first, second):
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make_optimizer([weight], TrainConfig(learning_rate=0.1, **options), torch.device("cpu"))
    for gradient, moved in ((2.0, first), (0.0, second)):
        before = weight.item()
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert before - weight.item() == pytest.approx(0.1 * moved, abs=1e-9)
