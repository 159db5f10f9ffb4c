"""REAL and Target Policy Optimization by hand: one term a prompt, whatever micro-batch its completions are in."""

from dataclasses import replace
from functools import partial
from math import exp, log
from typing import Any

import pytest
import torch

from logratio.losses import CompletionLogps, GRPOLoss, Totals

from ._families import refused

# Of prompt 7 three completions and an empty one, of prompt 3 one; means of log rho 0.2, -0.4, 0.3 and 0.5
LOGPS = [[-1.0, -2.0, -1.5], [-0.5, 0.0, 0.0], [-3.0, -1.0, 0.0], [0.0, 0.0, 0.0], [-2.0, -2.0, 0.0]]
GAINS = [[0.1, 0.2, 0.3], [-0.4, 0.0, 0.0], [0.5, 0.1, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
LENGTHS = [3, 1, 2, 0, 2]
PROMPTS = [7, 7, 7, 7, 3]
ADVANTAGES = [1.0, 0.5, -1.0, 2.0, -0.25]
MEANS = [0.2, -0.4, 0.3, 0.0, 0.5]


def given(which: Any = slice(None), advantages: list[float] = ADVANTAGES) -> tuple[CompletionLogps, dict[str, Any]]:
    """(policy, what else the loss is called with) of these completions."""
    x = torch.tensor(LOGPS, dtype=torch.float64)[which]
    mask = torch.arange(3) < torch.tensor(LENGTHS)[which][:, None]
    return CompletionLogps(x.clone().requires_grad_(), mask), {
        "advantages": torch.tensor(advantages, dtype=torch.float64)[which],
        "old": CompletionLogps(x - torch.tensor(GAINS, dtype=torch.float64)[which], mask),
        "prompts": torch.tensor(PROMPTS)[which],
    }


def whole(loss: GRPOLoss, advantages: list[float] = ADVANTAGES) -> tuple[float, list[list[float]]]:
    """(value, gradient of scored tokens) of the step, of two prompts."""
    policy, others = given(advantages=advantages)
    totals = replace(Totals.of(policy, loss.collect(policy, **others)), num_prompts=2)
    value = loss(policy, **others, totals=totals).loss
    value.backward()
    grad = policy.per_token_logps.grad
    assert (grad[~policy.completion_mask] == 0).all()
    return value.item(), [row[m].tolist() for row, m in zip(grad, policy.completion_mask, strict=True)]


def of_completions(slopes: list[float]) -> list[Any]:
    """The same at each of a completion's tokens."""
    return [pytest.approx([s] * n, rel=1e-12, abs=1e-15) for s, n in zip(slopes, LENGTHS, strict=True)]


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_real(tau):
    """log(1 + e^(-s1/tau) + e^(-s2/tau)) + log(1 + e^(s3/tau)), and of the other prompt log(1 + e^(s5/tau))."""
    e = [exp((-1 if a > 0 else 1) * s / tau) for s, a in zip(MEANS, ADVANTAGES, strict=True)]
    right, wrong, other = 1 + e[0] + e[1], 1 + e[2], 1 + e[4]
    value, grad = whole(GRPOLoss(loss_type="real", real_temperature=tau))
    assert value == pytest.approx((log(right) + log(wrong) + log(other)) / 2, rel=1e-12)
    slopes = [-e[0] / right, -e[1] / right, e[2] / wrong, 0.0, e[4] / other]
    assert grad == of_completions([s / tau / max(n, 1) / 2 for s, n in zip(slopes, LENGTHS, strict=True)])


def test_reals_labels_are_signs():
    """Whatever their size; what has A = 0 is in no sum."""
    loss = GRPOLoss(loss_type="real")
    assert whole(loss) == whole(loss, [9.0, 0.1, -3.0, -7.0, -1.0])
    value, grad = whole(loss, [0.0, 0.0, -1.0, 1.0, 0.0])
    assert value == pytest.approx(log(1 + exp(0.6)) / 2, rel=1e-12) and grad[0] == [0] * 3 and grad[4] == [0] * 2
    assert whole(loss, [0.0] * 5) == (0, [[0] * n for n in LENGTHS])


def test_reals_gradient_is_bounded():
    """1 / tau a completion at most, however far it has gone."""
    for gain in (-1e3, 1e3):
        policy = CompletionLogps(torch.tensor([[-2e3]], requires_grad=True), torch.ones(1, 1, dtype=torch.bool))
        others = {
            "advantages": torch.tensor([1.0]),
            "old": CompletionLogps(torch.tensor([[-2e3 - gain]]), policy.completion_mask),
            "prompts": torch.tensor([0]),
        }
        loss = GRPOLoss(loss_type="real")
        value = loss(policy, **others, totals=Totals.of(policy, loss.collect(policy, **others))).loss
        value.backward()
        assert value.item() == pytest.approx(max(-gain / 0.5, 0))
        assert policy.per_token_logps.grad.item() == pytest.approx(-2.0 if gain < 0 else 0)


@pytest.mark.parametrize("eta", [1.0, 0.25])
def test_target_po(eta):
    """-sum q log p, of gradient p - q; alone a completion has p = q = 1."""
    sums = [-4.5, -0.5, -4.0]
    old = [-4.5 - 0.6, -0.5 + 0.4, -4.0 - 0.6]
    p = [exp(x) / sum(map(exp, sums)) for x in sums]
    tilted = [exp(x + a / eta) for x, a in zip(old, ADVANTAGES, strict=False)]
    q = [x / sum(tilted) for x in tilted]
    value, grad = whole(GRPOLoss(loss_type="target_po", target_po_temperature=eta))
    assert value == pytest.approx(-sum(b * log(a) for a, b in zip(p, q, strict=True)) / 2, rel=1e-12)
    assert grad == of_completions([*((a - b) / 2 for a, b in zip(p, q, strict=True)), 0, 0])


def test_target_pos_shares_are_at_most_one():
    """However far a forward pass is from the one before the step, as another kernel may be over thousands of tokens."""
    policy, others = given()
    loss = GRPOLoss(loss_type="target_po")
    lower = replace(policy, per_token_logps=policy.per_token_logps - 50)
    loss(policy, **others, totals=Totals.of(policy, loss.collect(lower, **others))).loss.backward()
    assert (policy.per_token_logps.grad[:, 0] * 5).abs().max() <= 1


def test_at_its_target_nothing_moves():
    """p = q where log p is log p_old + A, up to a constant of the prompt."""
    policy, others = given()
    sums = policy.masked(others["old"].per_token_logps).sum(-1)
    moved = policy.sums.detach() - 0.75
    others["advantages"] = torch.where(others["prompts"] == 7, moved - sums, torch.full_like(sums, 5.0))
    loss = GRPOLoss(loss_type="target_po")
    loss(policy, **others, totals=Totals.of(policy, loss.collect(policy, **others))).loss.backward()
    assert policy.per_token_logps.grad.abs().max() < 1e-15


@pytest.mark.parametrize("loss_type", ["real", "target_po"])
@pytest.mark.parametrize("deal", [[[0, 1, 2, 3, 4]], [[4, 2], [0], [3], [1]], [[3, 0], [1, 4, 2]]], ids=str)
def test_completions_of_a_prompt_in_several_micro_batches(loss_type, deal):
    loss = GRPOLoss(loss_type=loss_type)
    parts = [given(which) for which in deal]
    collected = torch.cat([loss.collect(policy, **others) for policy, others in parts])
    total, grads = 0.0, {}
    for which, (policy, others) in zip(deal, parts, strict=True):
        totals = replace(Totals.of(policy), num_prompts=2, collected=collected)
        value = loss(policy, **others, totals=totals).loss
        value.backward()
        total += value.item()
        grads |= dict(zip(which, policy.per_token_logps.grad.tolist(), strict=True))
    value, grad = whole(loss)
    assert total == pytest.approx(value, rel=1e-12)
    got = [grads[i][:n] for i, n in enumerate(LENGTHS)]
    assert got == [pytest.approx(row, rel=1e-12, abs=1e-15) for row in grad]


@pytest.mark.parametrize("loss_type", ["real", "target_po"])
def test_what_is_asked_for(loss_type):
    loss = GRPOLoss(loss_type=loss_type)
    assert loss.wants_prompts and loss.window_pass == "own" and not GRPOLoss().wants_prompts
    policy, others = given()
    totals = Totals.of(policy, loss.collect(policy, **others))
    assert totals.collected[:, 0].isnan().tolist() == [False, False, False, True, False]
    with refused(f"loss_type={loss_type} compares a prompt's completions: it needs `prompts`, a number for each"):
        loss.collect(policy, **others | {"prompts": None})
    for call in (loss.collect, partial(loss, totals=totals)):
        with refused("prompts must be [5], one a completion, got [1]"):
            call(policy, **others | {"prompts": torch.tensor([1])})
        with refused("old must have the policy's rows and tokens, got [1, 3] for [5, 3]"):
            call(policy, **others | {"old": others["old"].rows(slice(1))})
        with refused(f"loss_type={loss_type} is of whole completions: advantages must be [5]"):
            call(policy, **others | {"advantages": torch.zeros(5, 3)})
    with refused(f"loss_type={loss_type} compares a prompt's completions: it needs `prompts`, a number for each"):
        loss(policy, **others | {"prompts": None}, totals=totals)
    with refused(f"off_policy_mask_threshold drops completions that {loss_type} compares; leave it out"):
        GRPOLoss(loss_type=loss_type, off_policy_mask_threshold=0.1)
    with refused(f"sampling_correction=sequence_mask does not fit loss_type {loss_type}; leave it out"):
        GRPOLoss(loss_type=loss_type, sampling_correction="sequence_mask")
