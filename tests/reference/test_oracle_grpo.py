"""The oracle's GRPO family against numbers worked out by hand; test_oracle_grpo_options.py has what modifies it."""

from math import exp, log, sqrt

import pytest
import torch
from torch import tensor

from logratio.reference import oracle

LN2, LN3 = log(2), log(3)


def steps(*sequences: list[float]) -> list[torch.Tensor]:
    return [tensor(sequence, dtype=torch.float64) for sequence in sequences]


def one(ratios: list[float], advantage: float, **options) -> float:
    """The loss of one sequence whose tokens have these ratios to the old policy; the log-probs are -1, -2, ..."""
    logps = [-1.0 - t for t in range(len(ratios))]
    old = [y - log(ratio) for y, ratio in zip(logps, ratios, strict=True)]
    return oracle.grpo(steps(logps), steps(old), None, [advantage], **options).item()


# ---------------------------------------------------------------------------------------------- the clipped surrogate
def test_grpo_clips_only_what_would_gain() -> None:
    for ratio, advantage, expected in [
        (1.5, 1.0, -1.2),  # held at 1 + epsilon
        (1.5, -1.0, 1.5),  # not held: the loss is the larger of the two
        (0.5, -1.0, 0.8),  # held at 1 - epsilon
        (0.5, 1.0, -0.5),
        (1.1, 2.0, -2.2),  # inside
    ]:
        for name in ("grpo", "dapo", "bnpo", "luspo", "rloo"):  # of one token all the same
            assert one([ratio], advantage, loss_type=name) == pytest.approx(expected), (name, ratio, advantage)
    assert one([1.5], 1.0, epsilon_high=0.3) == pytest.approx(-1.3)
    assert one([0.5], -1.0, epsilon_high=0.3) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "loss_type, expected",
    [
        # one token of -1.2, three of 0.8, and a sequence with nothing to score
        ("grpo", (-1.2 + 0.8) / 3),
        ("dapo", (-1.2 + 2.4) / 4),
        ("bnpo", (-1.2 + 2.4) / 4),
        ("dr_grpo", (-1.2 + 2.4) / (3 * 8)),
        ("luspo", (-1.2 + 2.4) / 3),
    ],
)
def test_normalizers(loss_type: str, expected: float) -> None:
    old = steps([-1.0], [-1.0] * 3, [])
    logps = steps([-1.0 + log(1.5)], [-1.0 - LN2] * 3, [])
    for level in ("token", "sequence"):  # all tokens of a sequence alike
        options = dict(loss_type=loss_type, max_completion_length=8, importance_sampling_level=level)
        loss = oracle.grpo(logps, old, None, [1.0, -1.0, 1.0], **options)
        assert loss.item() == pytest.approx(expected)
        assert oracle.grpo(steps([], []), None, None, [1.0, -1.0], **options).item() == 0


def test_the_ratio_of_a_sequence_is_the_geometric_mean() -> None:
    # ratios 9 and 1, advantage -1, so not held: 9 and 1 on the token level, 3 and 3 at sequence level
    assert one([9, 1], -1.0) == pytest.approx((9 + 1) / 2)
    assert one([9, 1], -1.0, importance_sampling_level="sequence") == pytest.approx(3)
    assert one([9, 1], -1.0, importance_sampling_level="sequence", loss_type="luspo") == pytest.approx(6)
    assert one([9, 1], -1.0, loss_type="luspo") == pytest.approx(10)


def test_on_policy_it_has_value_minus_advantage_and_the_policy_gradient() -> None:
    logps = steps([-1.0, -3.0])
    logps[0].requires_grad_()
    loss = oracle.grpo(logps, None, None, [0.7])
    loss.backward()
    assert loss.item() == pytest.approx(-0.7) and logps[0].grad.tolist() == pytest.approx([-0.35, -0.35])


# ---------------------------------------------------------------------------------------------- its relatives
@pytest.mark.parametrize(
    "ratio, high, weight", [(1.5, None, 1.5), (8.0, None, 5.0), (1.5, 0.2, 0.2), (8.0, 5.0, 5.0), (0.1, 5.0, 0.1)]
)
def test_cispo_weighs_the_log_likelihood_by_the_capped_ratio(ratio: float, high: float | None, weight: float) -> None:
    logps, old = steps([-2.0, -3.0]), steps([-2.0 - log(ratio), -3.0 - log(ratio)])
    logps[0].requires_grad_()
    for level in ("token", "sequence"):
        logps[0].grad = None
        options = dict(loss_type="cispo", epsilon_high=high, importance_sampling_level=level)
        loss = oracle.grpo(logps, old, None, [-0.7], **options)
        loss.backward()
        assert loss.item() == pytest.approx(weight * 0.7 * -2.5)
        assert logps[0].grad.tolist() == pytest.approx([0.7 * weight / 2] * 2)


@pytest.mark.parametrize(
    "ratio, advantage, taus, expected",
    [
        (1.0, 1.0, (1.0, 1.05), -2.0),
        (1.0, -1.0, (1.0, 1.05), 2 / 1.05),
        (1 + LN3, 1.0, (1.0, 9.0), -3.0),  # 4 * 3/4
        (1 + LN3, 1.0, (2.0, 9.0), -1.8),  # 2 * 9/10
        (1 + LN3, -3.0, (9.0, 2.0), 5.4),
        (1 - LN3 / 2, 1.0, (2.0, 9.0), -0.5),  # 2 * 1/4
    ],
)
def test_sapo(ratio: float, advantage: float, taus: tuple[float, float], expected: float) -> None:
    options = dict(loss_type="sapo", sapo_temperature_pos=taus[0], sapo_temperature_neg=taus[1])
    assert one([ratio], advantage, **options) == pytest.approx(expected)


def test_sapo_is_a_mean_of_means() -> None:
    loss = oracle.grpo(steps([-1.0], [-1.0] * 3, []), None, None, [1.0, 2.0, 1.0], loss_type="sapo")
    assert loss.item() == pytest.approx(-(2 + 4) / 3)


@pytest.mark.parametrize(
    "ratios, advantage, weight",
    [
        ([2.0, 1.0], 1.0, exp(3) * 4 * exp(-6)),  # k = 2, lambda = 3
        ([2.0, 1.0], -1.0, exp(2) * 8 * exp(-4)),  # 3, 2
        ([4.0, 0.25], -1.0, 1.0),  # the ratio of the sequence is the product
        ([exp(30), exp(-25)], 1.0, 1.0),  # each within +-20
        ([exp(-30), 1.0], 1.0, exp(3) * 1e-16),  # the product at least 1e-8
        ([exp(15), exp(15)], 1.0, 0.0),
    ],
)
def test_vespo(ratios: list[float], advantage: float, weight: float) -> None:
    # the log-probs are -1, -2: their token mean -1.5
    assert one(ratios, advantage, loss_type="vespo") == pytest.approx(weight * advantage * 1.5, rel=1e-6, abs=1e-30)


def test_vespo_takes_a_zero_advantage_and_given_parameters() -> None:
    assert one([2.0], 0.0, loss_type="vespo") == 0
    options = dict(vespo_k_pos=1.0, vespo_lambda_pos=2.0, vespo_k_neg=4.0, vespo_lambda_neg=1.0, loss_type="vespo")
    assert one([2.0], 1.0, **options) == pytest.approx(2 * exp(2 - 4))
    assert one([2.0], -1.0, **options) == pytest.approx(-16 * exp(1 - 2))
    assert one([2.0], 1.0, importance_sampling_level="sequence", loss_type="vespo") == one(
        [2.0], 1.0, loss_type="vespo"
    )


def test_gmpo_clips_each_log_ratio_and_averages_them() -> None:
    ratios = [exp(0.5), exp(-0.5)]
    for advantage, mean in [(1.0, (0.2 - 0.5) / 2), (-1.0, (0.5 - 0.2) / 2)]:
        assert one(ratios, advantage, loss_type="gmpo", epsilon=0.2) == pytest.approx(-advantage * exp(mean))
    assert one(ratios, 1.0, loss_type="gmpo") == pytest.approx(-exp((0.4 - 0.5) / 2))  # 0.4 by default
    assert one(ratios, -1.0, loss_type="gmpo", epsilon=0.2, epsilon_high=0.4) == pytest.approx(exp((0.5 - 0.2) / 2))
    loss = oracle.grpo(steps([-1.0], [-1.0] * 3, []), None, None, [1.0, 2.0, 1.0], loss_type="gmpo")
    assert loss.item() == pytest.approx(-3 / 3)  # one term a sequence
    sequence = dict(importance_sampling_level="sequence", loss_type="grpo")
    for advantage in (1.0, -1.0):  # without the clip it is GSPO
        gspo = one([3.0, 0.5, 2.0], advantage, epsilon=0.999, epsilon_high=50.0, **sequence)
        assert one([3.0, 0.5, 2.0], advantage, epsilon=50.0, loss_type="gmpo") == pytest.approx(gspo)


def test_rloo_takes_the_whole_sequence_as_one_action() -> None:
    ratios = [sqrt(3), sqrt(3)]  # W = 3
    assert one(ratios, 1.0, loss_type="rloo") == pytest.approx(-1.2)
    assert one(ratios, -1.0, loss_type="rloo") == pytest.approx(3.0)
    loss = oracle.grpo(steps([-1.0], [-1.0] * 3, []), None, None, [1.0, 2.0, 1.0], loss_type="rloo")
    assert loss.item() == pytest.approx(-3 / 3)


# ---------------------------------------------------------------------------------------------- laws
NAMES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo", "gmpo", "rloo")


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_every_loss_has_the_policy_gradient(name: str) -> None:
    logps = [y.requires_grad_() for y in steps([-1.0, -3.0], [-0.5, -2.0, -1.0], [])]
    advantages = [0.7, -1.3, 2.0]
    oracle.grpo(logps, None, None, advantages, loss_type=name, epsilon_high=1.0, max_completion_length=7).backward()
    for y, advantage in zip(logps[:2], advantages[:2], strict=True):
        divisor = {"grpo": 3 * len(y), "sapo": 3 * len(y), "gmpo": 3 * len(y), "luspo": 3, "rloo": 3, "dr_grpo": 3 * 7}
        assert y.grad.tolist() == pytest.approx([-advantage / divisor.get(name, 5)] * len(y))


def test_without_a_clip_the_surrogate_is_the_weighted_advantage_and_with_one_it_is_never_smaller() -> None:
    ratios = [0.3, 1.1, 2.5]
    for advantage in (1.3, -0.8):
        free = -advantage * sum(ratios) / 3
        assert one(ratios, advantage, epsilon=100.0) == pytest.approx(free)
        assert one(ratios, advantage) >= free
    for name in ("grpo", "dapo", "cispo", "sapo", "luspo"):  # one token is a sequence
        token, sequence = (one([1.7], -0.8, loss_type=name, importance_sampling_level=x) for x in ("token", "sequence"))
        assert token == pytest.approx(sequence)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("cispo", "vespo")])
def test_gradients_agree_with_finite_differences(name: str, level: str) -> None:
    inputs = [y.requires_grad_() for y in steps([-1.0, -0.5], [-2.0, -0.3, -0.7])]
    old, ref = steps([-1.25, -0.4], [-1.1, -0.35, -1.5]), steps([-0.7, -0.9], [-1.0, -0.8, -0.6])
    for y in (*old, *ref):
        y.requires_grad_()
    for beta, estimator in [(0.0, "k3")] if name == "rloo" else [(0.3, "k1"), (0.3, "k2"), (0.3, "k3")]:
        options = dict(loss_type=name, importance_sampling_level=level, beta=beta, kl_estimator=estimator)

        def loss(a: torch.Tensor, b: torch.Tensor, options: dict = options) -> torch.Tensor:
            return oracle.grpo([a, b], old, ref, [0.7, -1.1], **options)

        assert torch.autograd.gradcheck(loss, inputs)
        loss(*inputs).backward()
    assert all(y.grad is None for y in (*old, *ref))


def test_an_unknown_loss() -> None:
    for options in ({"loss_type": "ppo"}, {"importance_sampling_level": "batch"}):
        with pytest.raises(ValueError, match="no formula"):
            one([1.0], 1.0, **options)
