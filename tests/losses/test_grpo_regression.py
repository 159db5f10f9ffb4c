"""A*-PO by hand, and as the installed TRL's trainer computes it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from logratio.losses import CompletionLogps, GRPOLoss, Totals

from ._families import refused

POLICY = [[-1.0, -2.0, -3.0], [-0.5, -9.0, -0.25], [-9.0, -9.0, -9.0]]
REF = [[-1.5, -1.0, -4.0], [-1.0, -9.0, -0.5], [-9.0, -9.0, -9.0]]  # log-ratios of 0.5 and 0.75
MASK = [[True, True, True], [True, False, True], [False, False, False]]
ADVANTAGES = [0.25, -1.0, 5.0]


def completions(rows: list[list[float]]) -> CompletionLogps:
    return CompletionLogps(torch.tensor(rows, dtype=torch.float64).requires_grad_(), torch.tensor(MASK))


def run(loss: GRPOLoss, **others: Any) -> tuple[float, list[list[float]]]:
    """(value, gradient)"""
    policy, ref = completions(POLICY), completions(REF)
    given = torch.tensor(ADVANTAGES, dtype=torch.float64)
    value = loss(policy, ref, advantages=given, totals=Totals.of(policy), **others).loss
    value.backward()
    assert ref.per_token_logps.grad is None
    return value.item(), policy.per_token_logps.grad.tolist()


@pytest.mark.parametrize("beta", [1e-3, 0.5])
def test_a2po(beta):
    """((beta 0.5 - 0.25)^2 + (beta 0.75 + 1)^2) / 3, of slope 2 beta (...) / 3 at each token."""
    value, grad = run(GRPOLoss(loss_type="a2po", a2po_beta=beta))
    first, second = beta * 0.5 - 0.25, beta * 0.75 + 1
    assert value == pytest.approx((first**2 + second**2) / 3, rel=1e-12)
    slopes = [2 * beta * x / 3 for x in (first, second)]
    expected = [[slopes[0]] * 3, [slopes[1], 0, slopes[1]], [0, 0, 0]]
    assert grad == [pytest.approx(row, rel=1e-12) for row in expected]


def test_where_the_implicit_reward_is_the_advantage_nothing_moves():
    policy = completions(POLICY)
    ref = completions(REF).detach()
    given = 0.5 * (policy.sums.detach() - ref.sums)
    out = GRPOLoss(loss_type="a2po", a2po_beta=0.5)(policy, ref, advantages=given, totals=Totals.of(policy)).loss
    out.backward()
    assert out.item() == 0 and (policy.per_token_logps.grad == 0).all()


def test_as_in_trl():
    """Its compute_loss, on log-probs of whole completions that are given to it, none of them empty."""
    trl = pytest.importorskip("trl.experimental.a2po")
    policy, ref = completions(POLICY[:2] + POLICY[:1]), completions(REF[:2] + REF[:1])
    mask = torch.tensor([*MASK[:2], MASK[0]])
    policy, ref = (CompletionLogps(x.per_token_logps, mask) for x in (policy, ref))
    rewards, v_star = torch.tensor([1.0, 0.0, 1.0]).double(), torch.tensor([0.75, 0.5, 0.25]).double()
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(beta2=trl.A2POConfig.beta2),
        _get_sequence_logps=lambda *_: policy.sums,
        _metrics={"train": {"implicit_reward": [], "advantage": []}},
    )
    inputs = dict.fromkeys(("input_ids", "attention_mask", "logits_to_keep"))
    inputs |= {"ref_logps": ref.sums.detach(), "rewards": rewards, "v_star": v_star}
    theirs = trl.A2POTrainer.compute_loss(stub, None, inputs)
    (slopes,) = torch.autograd.grad(theirs, policy.per_token_logps)
    loss = GRPOLoss(loss_type="a2po")
    ours = loss(policy, ref, advantages=rewards - v_star, totals=Totals.of(policy)).loss
    (own,) = torch.autograd.grad(ours, policy.per_token_logps)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    torch.testing.assert_close(own, slopes, rtol=1e-12, atol=0)
    assert loss.a2po_beta == trl.A2POConfig.beta2


def test_what_is_asked_for():
    loss = GRPOLoss(loss_type="a2po")
    assert loss.wants_reference and loss.window_pass is None
    policy = completions(POLICY)
    with refused("loss_type=a2po needs the reference log-probs, ref is None"):
        loss(policy, advantages=torch.zeros(3), totals=Totals.of(policy))
    with refused("loss_type=a2po is of whole completions: advantages must be [3]"):
        loss(policy, completions(REF), advantages=torch.zeros(3, 3), totals=Totals.of(policy))
    with pytest.raises(ValueError, match="^a2po_beta=0.0 must be positive"):
        GRPOLoss(loss_type="a2po", a2po_beta=0.0)
