"""The oracle's weights for what another policy sampled, against numbers worked out by hand."""

from math import exp, log, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, tensor

from logratio.reference import oracle
from logratio.reference.oracle.grpo import Options
from logratio.reference.oracle.sampling import bernoulli_kl, weights

PI, PROX, MU = [0.4, 0.1], [0.2, 0.1], [0.1, 0.4]  # w = 2, 1/4; pi - mu = 0.3, -0.3


def logs(*values: float) -> Tensor:
    return tensor(values, dtype=torch.float64).log()


def weighed(correction: str, low: float | None = None, high: float | None = None, advantage: float = 1.0) -> Any:
    o = Options(sampling_correction=correction, sampling_clip_min=low, sampling_clip_max=high)
    return pytest.approx(weights(logs(*PI), logs(*PROX), logs(*MU), advantage, o), rel=1e-12)


def test_weights() -> None:
    for correction, low, high, expected in [
        ("none", None, None, [1, 1]),
        ("decoupled", None, None, [2, 0.25]),
        ("token_truncate", 0.5, 1.5, [1.5, 0.5]),
        ("token_mask", 0.5, 1.5, [0, 0]),
        ("token_mask", 0.5, None, [2, 0]),
        ("token_mask", None, 1.5, [0, 0.25]),
        ("icepop", None, None, [2, 0]),
        ("sequence_truncate", None, None, [0.5, 0.5]),
        ("sequence_truncate", 0.75, None, [0.75, 0.75]),
        ("sequence_mask", 0.75, None, [0, 0]),
        ("geometric_truncate", 0.5, 2, [sqrt(0.5)] * 2),
        ("geometric_mask", 0.75, 2, [0, 0]),
        ("geometric_mask", 0.5, 2, [sqrt(0.5)] * 2),
        ("dppo_tv", -0.25, 0.25, [0, 0.25]),  # where A > 0 a token that has fallen is on its way back
        ("dppo_tv", -0.25, 0.35, [2, 0.25]),
        ("dppo_kl", -0.25, 0.25, [2, 0.25]),  # of 0.2263 and 0.3112
        ("dppo_kl", -0.4, 0.2, [0, 0.25]),
        ("ipo", -0.35, 0.35, [2, 0.25]),
        ("ipo", -0.25, 0.35, [2, 0]),
    ]:
        assert expected == weighed(correction, low, high), (correction, low, high)
    assert [2, 0] == weighed("dppo_tv", -0.25, 0.25, advantage=-1)
    assert [2, 0] == weighed("dppo_kl", -0.25, 0.25, advantage=-1)
    assert [2, 0.25] == weighed("dppo_tv", -0.25, 0.25, advantage=0)


def test_the_divergence_of_two_outcomes() -> None:
    assert bernoulli_kl(log(0.1), log(0.4)) == pytest.approx(0.1 * log(0.25) + 0.9 * log(1.5))
    assert bernoulli_kl(log(0.3), log(0.3)) == pytest.approx(0, abs=1e-15)
    assert bernoulli_kl(0.0, log(0.5)) == pytest.approx(log(2))  # of what is certain
    assert bernoulli_kl(log(0.5), 0.0) == float("inf")
    assert bernoulli_kl(0.0, 0.0) == 0


def test_they_multiply_the_policy_term_alone() -> None:
    """Two tokens of A = 1 at ratio 2, held at 1.2, and a KL estimate that nothing multiplies."""
    policy, prox, mu = ([logs(*x)] for x in (PI, PROX, MU))
    options = {"behavior_logps": mu, "sampling_correction": "decoupled"}
    assert oracle.grpo(policy, prox, None, [1.0], **options).item() == pytest.approx(-(2 * 1.2 + 0.25) / 2)
    ref = [policy[0] - log(2)]
    kl = (exp(-log(2)) + log(2) - 1) * (2 + 1) / 2
    assert oracle.grpo(policy, prox, ref, [0.0], beta=1.0, **options).item() == pytest.approx(kl)


def test_the_whole_sequence_is_weighed_at_once() -> None:
    policy, prox, mu = ([logs(*x)] for x in (PI, PROX, MU))
    options = {"behavior_logps": mu, "sampling_correction": "sequence_truncate"}
    for name, term in (("rloo", -1.2), ("gmpo", -sqrt(exp(0.4)))):
        loss = oracle.grpo(policy, prox, None, [1.0], loss_type=name, **options)
        assert loss.item() == pytest.approx(0.5 * term), name


def test_vespo_takes_them_into_its_ratio() -> None:
    """W = 2 of the policy to the proximal one, times 2/4 to the sampler: phi(1) = 1."""
    policy, prox, mu = ([logs(*x)] for x in (PI, PROX, MU))
    options = {"loss_type": "vespo", "behavior_logps": mu, "sampling_correction": "decoupled"}
    loss = oracle.grpo(policy, prox, None, [1.0], **options)
    assert loss.item() == pytest.approx(-(log(0.4) + log(0.1)) / 2)
    masked = oracle.grpo(policy, prox, None, [1.0], **options | {"sampling_correction": "icepop"})
    assert abs(masked.item()) < 1e-12  # a token that is left out is a factor of 1e-8


def test_the_off_policy_mask_is_measured_from_what_sampled() -> None:
    policy, mu = [logs(0.4)], [logs(0.8)]  # log mu - log pi = ln 2
    for threshold, expected in ((0.6, 0.0), (0.8, 1.0)):
        options = {"behavior_logps": mu, "off_policy_mask_threshold": threshold}
        assert oracle.grpo(policy, None, None, [-1.0], **options).item() == expected


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match="^sampling_correction=icepop needs behavior_logps$"):
        oracle.grpo([logs(0.5)], None, None, [1.0], sampling_correction="icepop")
