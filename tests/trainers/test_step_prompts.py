"""A prompt's completions may be in several micro-batches: what is of all of them is the same."""

import dataclasses

import pytest
import torch

from logratio.losses import GRPOLoss, Kind
from logratio.trainers.batches.packing import split_groups
from logratio.trainers.data.examples import Example

from .test_step import built, examples_for, make_step, model  # noqa: F401


def rollouts() -> list[Example]:
    """Six prompts, of which the last two are the same row again."""
    examples = examples_for(Kind.GROUPED)
    again = [dataclasses.replace(e, row=i, occurrence=1) for i, e in enumerate(examples[4:])]
    return examples[:4] + again


def gradient(model, loss: GRPOLoss, examples: list[Example], budget: int) -> tuple[float, torch.Tensor]:  # noqa: F811
    """(loss, gradient) of a step on them; of old log-probs that are a little off."""
    model.zero_grad()
    step = make_step(model, loss, micro_batch_tokens=budget)
    micros = step.micro_batches(split_groups(examples, budget))
    step.fill_old(micros)
    for micro in micros:
        assert micro.old is not None
        micro.old = micro.old - 0.1 * torch.cos(7 * micro.old)
    result = step(micros, step.totals(examples, micros)).reduced(step.accelerator)
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return result["loss"], found


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "real"},
        {"loss_type": "target_po", "target_po_temperature": 0.1},
        {"loss_type": "kl_cov", "cov_share": 0.2},
        {"loss_aggregation": "prompt_mean"},
        {"optimal_token_baseline": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_divided_prompt(model, options):  # noqa: F811
    loss, examples = GRPOLoss(**options), rollouts()
    assert len(split_groups(examples, 16)) > len(examples)
    value, whole = gradient(model, loss, examples, 10_000)
    parts, found = gradient(model, loss, examples, 16)
    assert parts == pytest.approx(value, rel=1e-10) and (found - whole).norm() <= 1e-10 * whole.norm()


def test_the_same_row_twice_is_two_prompts(model):  # noqa: F811
    """Else their completions would be compared with each other."""
    loss = GRPOLoss(loss_type="target_po", target_po_temperature=0.1)
    examples = rollouts()
    confused = [dataclasses.replace(e, occurrence=0) for e in examples]
    apart = [dataclasses.replace(e, row=i, occurrence=0) for i, e in enumerate(examples)]
    value, _ = gradient(model, loss, examples, 10_000)
    assert gradient(model, loss, apart, 10_000)[0] == pytest.approx(value, rel=1e-12)
    assert gradient(model, loss, confused, 10_000)[0] != pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("name", ["old", "behavior"])
def test_what_the_old_policy_and_the_sampler_said_is_collected(model, name):  # noqa: F811
    """M2PO's squares of log-ratios; on policy no token is taken further from 1."""
    step = make_step(model, GRPOLoss(loss_type="m2po"), micro_batch_tokens=40)
    examples = rollouts()
    micros = step.micro_batches(examples)
    step.fill_old(micros)
    assert step.totals(examples, micros).collected.isinf().all()
    for micro in micros:
        setattr(micro, name, micro.old - 0.5)
    squares = step.totals(examples, micros).collected[:, 0]
    some = sum(sum(len(c.ids) for c, a in zip(e.completions, e.advantages, strict=True) if a > 0) for e in examples)
    assert squares.isfinite().sum() == some and squares[squares.isfinite()].tolist() == pytest.approx([0.25] * some)
