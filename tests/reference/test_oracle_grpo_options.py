"""What modifies the oracle's GRPO: KL, bounds, masks, entropy. Numbers worked out by hand."""

from math import exp, log

import pytest
import torch
from torch import tensor

from logratio.reference import oracle

LN2, LN3 = log(2), log(3)


def steps(*sequences: list[float]) -> list[torch.Tensor]:
    return [tensor(sequence, dtype=torch.float64) for sequence in sequences]


def one(ratio: float, advantage: float, **options) -> float:
    return oracle.grpo(steps([-1.0 + log(ratio)]), steps([-1.0]), None, [advantage], **options).item()


# ---------------------------------------------------------------------------------------------- KL
@pytest.mark.parametrize("estimator, kl", [("k1", -LN2), ("k2", LN2**2 / 2), ("k3", 1 - LN2)])
def test_kl(estimator: str, kl: float) -> None:
    # ref = policy + ln 2; the ratio 3/2 multiplies when corrected. A = 0 leaves the KL alone
    logps, old, ref = steps([-2.0 + log(1.5)]), steps([-2.0]), steps([-2.0 + LN3])
    for name in ("grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo", "gmpo"):
        for corrected, factor in [(True, 1.5), (False, 1.0)]:
            factor = 1.0 if name == "gmpo" else factor
            options = dict(beta=0.04, use_bias_correction_kl=corrected, kl_estimator=estimator, loss_type=name)
            loss = oracle.grpo(logps, old, ref, [0.0], **options)
            assert loss.item() == pytest.approx(0.04 * factor * kl), (name, corrected)
    with pytest.raises(ValueError, match="needs ref_logps"):
        oracle.grpo(logps, old, None, [0.0], beta=0.04)


def test_kl_is_averaged_as_the_policy_term_is() -> None:
    logps, ref = steps([-2.0], [-2.0] * 3, []), steps([-2.0], [-2.0 + LN2] * 3, [])
    for name, divisor in [("grpo", 9 / 3), ("dapo", 4 / 3), ("dr_grpo", 24 / 3), ("luspo", 3 / 3), ("gmpo", 9 / 3)]:
        loss = oracle.grpo(logps, None, ref, [0.0] * 3, beta=0.5, loss_type=name, max_completion_length=8)
        assert loss.item() == pytest.approx(0.5 * (1 - LN2) / divisor), name


def test_the_corrected_kl_takes_the_ratio_of_the_sequence_where_that_is_the_level_and_no_delta() -> None:
    logps, old = steps([-1.0, -1.0]), steps([-1.0 - 2 * LN3, -1.0])  # ratios 9 and 1, as a sequence 3 and 3
    ref = steps([-1.0 + LN2, -1.0])
    for level, ratio in [("token", 9), ("sequence", 3)]:
        options = dict(beta=1.0, delta=1.5, importance_sampling_level=level)
        assert oracle.grpo(logps, old, ref, [0.0], **options).item() == pytest.approx(ratio * (1 - LN2) / 2)


def test_kl_estimators() -> None:
    for d in (-1.5, 0.0, 0.4, 1e-6):
        y = tensor(d, dtype=torch.float64, requires_grad=True)
        ref = torch.zeros((), dtype=torch.float64)
        for name, value, slope in [("k1", d, 1), ("k2", d * d / 2, d), ("k3", exp(-d) + d - 1, 1 - exp(-d))]:
            kl = oracle.kl_estimate(y, ref, name)
            assert kl.item() == pytest.approx(value, abs=1e-15)
            assert torch.autograd.grad(kl, y)[0].item() == pytest.approx(slope, abs=1e-15)
            assert name == "k1" or kl.item() >= 0
    tiny = oracle.kl_estimate(tensor(1e-6, dtype=torch.float64), tensor(0.0, dtype=torch.float64), "k3")
    assert tiny.item() == pytest.approx(5e-13, rel=1e-6)
    with pytest.raises(ValueError, match="no formula"):
        oracle.kl_estimate(y, ref, "k4")


def test_k3_weighed_by_the_ratio_is_the_kl_and_has_its_gradient() -> None:
    # three tokens in all: the expectation under the old policy is a sum
    logits = tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    old, ref = (torch.log_softmax(tensor(z, dtype=torch.float64), 0) for z in ([0.0, 1.0, 0.5], [1.0, 0.2, 0.0]))
    policy = torch.log_softmax(logits, 0)
    exact = torch.sum(policy.exp() * (policy - ref))
    expected = sum(
        old[v].exp() * oracle.grpo([policy[v : v + 1]], [old[v : v + 1]], [ref[v : v + 1]], [0.0], beta=1.0)
        for v in range(3)
    )
    assert expected.item() == pytest.approx(exact.item())
    ours, truth = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (expected, exact))
    assert ours.tolist() == pytest.approx(truth.tolist())


# ---------------------------------------------------------------------------------------------- delta
def test_delta_bounds_the_unclipped_ratio() -> None:
    for ratio, advantage, delta, expected in [
        (5.0, -1.0, None, 5.0),
        (5.0, -1.0, 2.0, 2.0),
        (1.9, -1.0, 2.0, 1.9),
        (5.0, 1.0, 2.0, -1.2),
        (5.0, 1.0, 1.1, -1.1),  # below 1 + epsilon it takes over
        (5.0, -1.0, 1.1, 1.2),
    ]:
        for name in ("grpo", "dapo", "luspo"):
            assert one(ratio, advantage, delta=delta, loss_type=name) == pytest.approx(expected)
    for ratio in (0.5, 1.1, 1.7, 3.0, 9.0):  # from 1 + epsilon on it is the dual clip, arXiv 1912.09729
        for advantage in (1.3, -0.6):
            surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            dual = max(surrogate, 2.5 * advantage) if advantage < 0 else surrogate
            assert one(ratio, advantage, delta=2.5) == pytest.approx(-dual)


# ---------------------------------------------------------------------------------------------- masks
def test_a_bad_sequence_that_the_policy_has_left_teaches_nothing() -> None:
    # means of old - policy: 1, 1, 0.5, nothing
    old = steps([-1.0, -1.0], [-1.0], [-1.0], [])
    logps = steps([-3.0, -1.0], [-2.0], [-1.5], [])
    ref = steps([-3.0, -1.0], [-2.0 + LN2], [-1.5], [])
    for y in logps:
        y.requires_grad_()
    options = dict(off_policy_mask_threshold=0.7, beta=0.5, use_bias_correction_kl=False)
    loss = oracle.grpo(logps, old, ref, [2.0, -1.0, -1.0, -1.0], **options)
    # the good one stays: ratios e^-2 and 1. The second is dropped, its KL and its token in the divisor stay
    expected = (-2.0 * (exp(-2) + 1) + 0.5 * (1 - LN2) + 0.8) / 4  # the third is clipped at 1 - epsilon
    assert loss.item() == pytest.approx(expected)
    at_the_bound = oracle.grpo(logps[1:2], old[1:2], None, [-1.0], off_policy_mask_threshold=1.0)
    assert at_the_bound.item() == pytest.approx(0.8)
    for name in ("grpo", "cispo", "sapo", "luspo", "vespo", "gmpo", "rloo"):
        dropped = oracle.grpo(logps[:1], old[:1], None, [-1.0], off_policy_mask_threshold=0.9, loss_type=name)
        assert dropped.item() == 0 and dropped.requires_grad, name


ENTROPY = [[1.0, 4.0], [2.0, 3.0, 2.0]]


@pytest.mark.parametrize(
    "share, kept",
    [
        (1.0, [[0, 1], [0, 1, 2]]),
        (0.9, [[1], [0, 1, 2]]),  # sorted 1 2 2 3 4: the bound is 0.4 of the way from 1 to 2
        (0.5, [[1], [0, 1, 2]]),  # 2, ties included
        (0.4, [[1], [1]]),  # 2.4
        (0.1, [[1], []]),
        (0.0, [[1], []]),
    ],
)
def test_only_the_tokens_of_the_highest_entropy_are_trained(share: float, kept: list[list[int]]) -> None:
    logps, ref = steps([-1.0, -2.0], [-1.0, -3.0, -1.0]), steps([-1.0 + LN2, -2.0], [-1.0, -3.0, -1.0])
    for y in logps:
        y.requires_grad_()
    options = dict(entropy=steps(*ENTROPY), top_entropy_quantile=share)
    loss = oracle.grpo(logps, None, None, [1.0, -1.0], **options)
    loss.backward()
    wanted = [[-a / 5 if t in kept[i] else 0.0 for t in range(len(ENTROPY[i]))] for i, a in enumerate([1.0, -1.0])]
    assert [y.grad.tolist() for y in logps] == [pytest.approx(row) for row in wanted]  # over all five tokens
    both = oracle.grpo(logps, None, ref, [1.0, -1.0], beta=0.5, **options)
    assert (both - loss).item() == pytest.approx(0.5 * (1 - LN2) / 5)  # the KL of a token that is not trained
    bonus = oracle.grpo(logps, None, None, [1.0, -1.0], entropy_coef=0.1, **options)
    acting = [ENTROPY[i][t] for i, row in enumerate(kept) for t in row]
    assert (loss - bonus).item() == pytest.approx(0.1 * sum(acting) / len(acting))


def test_gmpo_averages_the_kept_tokens() -> None:
    logps, old = steps([-1.0, -1.0, -1.0]), steps([-1.1, -0.9, -1.0])
    options = dict(loss_type="gmpo", entropy=steps([3.0, 1.0, 2.0]), top_entropy_quantile=0.5)
    assert oracle.grpo(logps, old, None, [1.0], **options).item() == pytest.approx(-exp((0.1 + 0.0) / 2))


def test_entropy_bonus_has_a_gradient_and_the_same_divisor_for_every_loss() -> None:
    entropy = [h.requires_grad_() for h in steps([1.0, 4.0], [2.0], [])]
    for name in ("grpo", "dr_grpo", "luspo", "rloo", "gmpo"):
        for h in entropy:
            h.grad = None
        logps = steps([-1.0, -2.0], [-3.0], [])
        loss = oracle.grpo(logps, None, None, [0.0] * 3, entropy=entropy, entropy_coef=0.3, loss_type=name)
        loss.backward()
        assert loss.item() == pytest.approx(-0.3 * 7 / 3)
        assert entropy[0].grad.tolist() == pytest.approx([-0.1, -0.1])
    assert oracle.grpo(steps([]), None, None, [1.0], entropy=steps([]), entropy_coef=0.3).item() == 0
    nothing = oracle.grpo(steps([]), None, None, [1.0], entropy=steps([]), top_entropy_quantile=0.5)
    assert nothing.item() == 0


def test_refusals() -> None:
    for options in ({"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}):
        with pytest.raises(ValueError, match="need entropy"):
            one(1.0, 1.0, **options)
    logps, entropy = steps([-1.0]), steps([1.0])
    for options in ({"beta": 0.1}, {"delta": 2.0}, {"top_entropy_quantile": 0.5}):
        with pytest.raises(ValueError, match="one term a sequence"):
            oracle.grpo(logps, None, logps, [1.0], loss_type="rloo", entropy=entropy, **options)
    with pytest.raises(ValueError, match="gmpo has no delta"):
        one(1.0, 1.0, loss_type="gmpo", delta=2.0)
