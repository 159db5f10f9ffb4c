"""The oracle's GRPO where tokens or completions are compared with others of the step, by hand."""

from math import exp, log

import pytest
import torch
from torch import tensor

from logratio.reference import oracle


def steps(*sequences: list[float]) -> list[torch.Tensor]:
    return [tensor(sequence, dtype=torch.float64) for sequence in sequences]


def of(policy: list[list[float]], gains: list[list[float]], advantages: list[float], **options) -> float:
    """The loss, times the number of tokens, of log-probs and log-ratios to the old policy."""
    old = [[y - g for y, g in zip(*both, strict=True)] for both in zip(policy, gains, strict=True)]
    return oracle.grpo(steps(*policy), steps(*old), None, advantages, **options).item() * sum(map(len, policy))


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(0.11, [1, 1, 1, 1]), (0.07, [1, 0, 1, 1]), (0.02, [0, 0, 1, 1]), (0.01, [0, 0, 0, 1])],
)
def test_m2po(threshold: float, kept: list[int]) -> None:
    """Gains of 0.2, 0.5 and, of A < 0, -1/8 go further: squares 0.04, 0.25, 1/64, of means 0.0156, 0.0278, 0.1019."""
    gains, advantages = [0.2, 0.5, -1 / 8, 2.0], [1.0, 1.0, -1.0, -1.0]
    expected = -sum(k * a * exp(g) for k, a, g in zip(kept, advantages, gains, strict=True))
    options = {"loss_type": "m2po", "m2po_threshold": threshold}
    assert of([[-1.0, -2.0], [-3.0, -4.0]], [gains[:2], gains[2:]], [1.0, -1.0], **options) == pytest.approx(expected)
    options["m2po_threshold"] = 0.2
    assert of([[-1.0, -2.0]], [[0.0, 0.5]], [1.0], **options) == -1  # 0.25 has no mean with what stands still


# covariances 2, 0, -1, 3
POLICY, SIGNS = [[-1.0, -3.0], [-2.0, -6.0]], [1.0, -1.0]


@pytest.mark.parametrize(
    ("share", "gain", "expected"),
    [
        (0.0, 0.0, 0.0),  # half of the first and of the last token: -1/2 - 1 + 1 + 1/2
        (0.0, 0.1, -exp(0.1) / 2 + 1 / 2),
        (0.0, 0.3, -1.2),  # the first is clipped, and the last drawn alone
        (0.5, 0.1, 0.0),
        (1.0, 0.1, 0.0),  # four of two
    ],
)
def test_clip_cov(share: float, gain: float, expected: float) -> None:
    """The log-ratio is the first token's."""
    got = of(POLICY, [[gain, 0.0], [0.0, 0.0]], SIGNS, loss_type="clip_cov", cov_share=share)
    assert got == pytest.approx(expected, abs=1e-12)


def test_clip_cov_of_a_sequence() -> None:
    """Of 0.3 and 0 the geometric mean is not clipped, so that the first and the last token have half each."""
    options = {"loss_type": "clip_cov", "importance_sampling_level": "sequence"}
    got = of(POLICY, [[0.3, 0.0], [0.0, 0.0]], SIGNS, **options)
    assert got == pytest.approx(-1.5 * exp(0.15) + 1.5)


@pytest.mark.parametrize(("share", "chosen"), [(0.0, [0, 0, 0, 1]), (0.5, [1, 0, 0, 1]), (1.0, [1, 1, 1, 1])])
def test_kl_cov(share: float, chosen: list[int]) -> None:
    gains = [0.5, -0.25, 0.75, -1.0]
    got = of(POLICY, [gains[:2], gains[2:]], SIGNS, loss_type="kl_cov", cov_share=share, kl_cov_coef=3.0)
    signs = (1, 1, -1, -1)
    expected = [-exp(g) * a + 3 * w * abs(g) for g, a, w in zip(gains, signs, chosen, strict=True)]
    assert got == pytest.approx(sum(expected))
    equal = of([[-1.0, -3.0], [-3.0, -1.0]], [[1.0, 1.0]] * 2, SIGNS, loss_type="kl_cov", kl_cov_coef=3.0)
    assert equal == pytest.approx(3.0)  # two of the same covariance, half a penalty each


def test_real() -> None:
    """Means of 0.5 and -1 are right, 0.25 wrong, of one prompt; of another one wrong at 0."""
    logps = steps([-1.0, -1.0], [-2.0], [-3.0], [], [-4.0])
    old = steps([-1.5, -1.5], [-1.0], [-3.25], [], [-4.0])
    options = {"loss_type": "real", "real_temperature": 0.5, "prompts": [1, 1, 1, 1, 2]}
    got = oracle.grpo(logps, old, None, [0.3, 2.0, -1.0, 1.0, -9.0], **options).item()
    assert got == pytest.approx((log(1 + exp(-1) + exp(2)) + log(1 + exp(0.5)) + log(2)) / 2)
    with pytest.raises(ValueError, match="real needs prompts"):
        oracle.grpo(logps, old, None, [1.0] * 5, loss_type="real")


def test_target_po() -> None:
    """p = 3/4, 1/4, and q of 1/2 e^(log 4) to 1/2 is 4/5, 1/5; alone there is nothing to learn."""
    logps, old = steps([log(0.75)], [log(0.25)], [-1.0]), steps([log(0.5)], [log(0.5)], [-3.0])
    options = {"loss_type": "target_po", "target_po_temperature": 0.5, "prompts": [0, 0, 1]}
    got = oracle.grpo(logps, old, None, [log(2), 0.0, 1.0], **options).item()
    assert got == pytest.approx(-(0.8 * log(0.75) + 0.2 * log(0.25)) / 2)


def test_optimal_token_baseline() -> None:
    """1 - 2 p + sum p^2 is 1/2 at p = 1/2 alone, 3/4 at 1/4: sums 1/2, 5/4 and 3/4; the baseline is (3/2 - 3/4) / (5/4)
    at the first place, none at the second, where one is alone."""
    logps, log_p2 = (
        steps([log(0.5), log(0.25)], [log(0.25)], [log(0.5)]),
        steps([log(0.5), log(0.25)], [log(0.25)], [0.0]),
    )
    options = {"optimal_token_baseline": True, "prompts": [0, 0, 1], "loss_type": "reinforce"}
    got = oracle.grpo(logps, None, None, [3.0, -1.0, 2.0], log_sum_p2=log_p2, **options).item()
    b = 0.75 / 1.25
    left = [(log(0.5), 3 - b), (log(0.25), 3), (log(0.25), -1 - b), (log(0.5), 2)]
    assert got == pytest.approx(-sum(y * a for y, a in left) / 4)
    half, options["prompts"] = log(0.5), [0, 0]  # below 0, as by rounding, a variance is 0: the other's weighs alone
    given = steps([0.0], [half]), None, None, [3.0, -1.0]
    assert oracle.grpo(*given, log_sum_p2=steps([half], [half]), **options).item() == 0
    with pytest.raises(ValueError, match="optimal_token_baseline needs prompts and log_sum_p2"):
        oracle.grpo(logps, None, None, [1.0] * 3, **options)
